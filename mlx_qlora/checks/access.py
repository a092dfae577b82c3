"""The hub, the model that is named, and whether the disks have room for both and for a run.

Nothing is downloaded into the cache, and the network is asked for a few seconds at most.
"""

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlx_qlora.checks.finding import Finding
from mlx_qlora.checks.offer import on_offer
from mlx_qlora.errors import SourceError, UserError
from mlx_qlora.estimates import trainable
from mlx_qlora.model import hub
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.weights import open_checkpoint
from mlx_qlora.train.memory import adapter_bytes

PATIENCE = 2.5  # seconds until the hub counts as away
LONGER = 6.0  # seconds for all that is asked about a model, once the hub has answered


# Llama 3.1 8B in 16 bits, and what the defaults train of it: a yardstick where no model is named.
LLAMA_8B_BYTES, LLAMA_8B_TRAINED = 2 * 8_030_261_248, 41_943_040


@dataclass
class Needs:
    """What the named model needs of the disks; Llama 3.1 8B's needs as long as none is known.

    Attributes:
        fetch: bytes to download.
        trained: how many numbers a run trains.
        lora: what it trains.
        of: whose figures they are.
        is_yardstick: whether that model is not the one that was asked for.
    """

    fetch: int = LLAMA_8B_BYTES
    trained: int = LLAMA_8B_TRAINED
    lora: LoraConfig = field(default_factory=LoraConfig)
    of: str = "Llama 3.1 8B"
    is_yardstick: bool = True


def the_hub(away: list[Exception]) -> Iterator[Finding]:
    """Whether the hub answers, and as whom it knows us; what kept it from answering is noted."""
    from huggingface_hub import constants, errors, get_token
    from huggingface_hub.utils import build_hf_headers, get_session

    if constants.HF_HUB_OFFLINE:
        away.append(errors.OfflineModeIsEnabled())
        text = "HF_HUB_OFFLINE is set: only models on this disk can be used"
        yield Finding("hub", "warning", text, "unset HF_HUB_OFFLINE")
        return
    url = constants.ENDPOINT

    def ask() -> Any:
        headers = build_hf_headers()  # asks the hub itself, at times
        return get_session().get(f"{url}/api/whoami-v2", headers=headers, timeout=PATIENCE)

    try:
        answer = _in_time(ask, PATIENCE)
    except Exception as error:
        away.append(error)
        text = f"{url} cannot be reached ({error}): only models on this disk can be used"
        yield Finding("hub", "warning", text, f"curl --head {url}")
        return
    if answer.status_code >= 500:
        away.append(RuntimeError(f"it answered {answer.status_code}"))
        text = f"{url} answered {answer.status_code}: only models on this disk can be used"
        yield Finding("hub", "warning", text, f"curl --head {url}")
        return
    yield Finding("hub", "ok", f"{url} answers")
    if answer.status_code == 200:
        yield Finding("login", "ok", f"logged in as {answer.json().get('name')}")
    elif get_token() is None:
        text = "not logged in; enough for public models, not for gated ones such as Meta's Llama"
        yield Finding("login", "ok", text, "hf auth login")
    elif answer.status_code == 401:
        text = hub.token_refused("/api/whoami-v2")
        yield Finding("login", "error", text, _command(text))
    else:
        text = f"{url} answered {answer.status_code} to the question who we are"
        yield Finding("login", "warning", text, "hf auth whoami")


def model(
    source: str, revision: str | None, away: list[Exception], needs: Needs
) -> Iterator[Finding]:
    """Whether the model can be had and read; `needs` is told what it needs of the disks."""
    try:
        if not hub.is_on_hub(source):
            text = _on_disk(hub.resolve(source, revision), needs)
        elif folder := hub.whole_copy(source, revision):
            files = hub.ModelFiles(folder, source, folder.name, source)
            text = f"{_on_disk(files, needs)}; whole in the cache"
        elif away:
            raise SourceError(hub.explain(away[0], source, revision))
        else:
            text = _on_hub(source, revision, needs)
    except UserError as error:
        yield Finding("model", "error", str(error), _command(str(error)))
    else:
        yield Finding("model", "ok", text)


def _on_disk(files: hub.ModelFiles, needs: Needs) -> str:
    """Reads the headers of a model's files: they are whole, and of an architecture we know."""
    layers = _layers(open_checkpoint(files).config, files.source, needs)
    needs.fetch = 0
    return f"{files.path}: a Llama of {layers} layers"


def _on_hub(source: str, revision: str | None, needs: Needs) -> str:
    """Asks the hub for the size and the architecture of a model that may be fetched."""
    try:
        offer = _in_time(partial(on_offer, source, revision, PATIENCE), LONGER)
    except RuntimeError as error:
        raise SourceError(hub.explain(error, source, revision)) from error
    layers = _layers(offer.config, source, needs)
    needs.fetch = offer.bytes_to_fetch
    begun = "in part in the cache" if offer.bytes_to_fetch < offer.bytes else "not in the cache yet"
    return (
        f"{source}: a Llama of {layers} layers that you may read, {begun}; "
        f"{offer.bytes_to_fetch / 1e9:,.2f} GB to fetch"
    )


def _layers(config: dict[str, Any], source: str, needs: Needs) -> int:
    """The number of layers; `needs` is told how many numbers a run trains.

    Raises:
        WeightsError: it is no Llama.
    """
    llama = LlamaConfig.from_hf(config)
    needs.trained = trainable(LlamaForCausalLM(llama), needs.lora)  # lazy zeros: no memory
    needs.of, needs.is_yardstick = source, False
    return llama.num_hidden_layers


def disks(needs: Needs, output_dir: str, save_total_limit: int) -> Iterator[Finding]:
    """Whether there is room for the download, and for the checkpoints of a run."""
    from huggingface_hub import constants

    cache, output = Path(constants.HF_HUB_CACHE), Path(output_dir).expanduser().absolute()
    # The newest ones, the best one, and one more before the oldest of them goes.
    kept = save_total_limit + 2
    run = kept * adapter_bytes(needs.trained)
    to_fetch = f"{needs.fetch / 1e9:,.2f} GB to fetch {needs.of}" if needs.fetch else "none"
    yield _room("cache", cache, needs.fetch, to_fetch, needs, "export HF_HOME=")
    checkpoints = f"{run / 1e9:,.2f} GB for {kept} checkpoints of {needs.of}"
    if needs.fetch and _existing(cache).stat().st_dev == _existing(output).stat().st_dev:
        run, checkpoints = run + needs.fetch, f"{checkpoints}, besides the download"
    yield _room("output", output, run, checkpoints, needs, "mlx-qlora train --output-dir ")


def _room(name: str, folder: Path, need: int, what: str, needs: Needs, fix: str) -> Finding:
    """Whether a disk has room for a folder that need not exist yet, and we may write there."""
    here = _existing(folder)
    elsewhere = f"{fix}/path/on/another/disk"
    if not here.is_dir():
        return Finding(name, "error", f"{here} is a file, so {folder} cannot be made", elsewhere)
    if not os.access(here, os.W_OK | os.X_OK):
        return Finding(name, "error", f"{here} cannot be written to by this user", elsewhere)
    free = shutil.disk_usage(here).free
    text = f"{folder}: {free / 1e9:,.2f} GB free, needed: {what}"
    if free < need:
        return Finding(name, "warning" if needs.is_yardstick else "error", text, elsewhere)
    return Finding(name, "ok", text)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _in_time(work: Callable[[], Any], seconds: float) -> Any:
    """What `work` returns, if it does so in time: name servers heed no client's timeout.

    Raises:
        RuntimeError: it took longer; its thread is left to itself and keeps nobody from leaving.
    """
    done: list[Any] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:  # raised again below, in the thread that asked
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise RuntimeError(f"no answer within {seconds:g} s")
    return done[0]


def _command(message: str) -> str | None:
    """The command in a message of `hub`, which is written for people."""
    for words, command in (
        ("unset HF_TOKEN", "unset HF_TOKEN"),
        ("HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    ):
        if words in message:
            return command
    only_gguf = r"as GGUF \(([^,)]+).*(hf download \S+) FILE (--local-dir \.)"
    if found := re.search(only_gguf, message):
        file, download, here = found.groups()
        return f"{download} {file} {here}"
    # Access is asked for before one logs in.
    if found := re.search(r"ask for access at (https://\S+[^,\s])", message):
        return f"python -m webbrowser {found[1]}"
    found = re.search(r"pip install .*|(?<=`)[^`]+(?=`)", message)
    return found[0] if found else None
