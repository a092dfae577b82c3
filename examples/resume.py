# %% [markdown]
"""# A stopped run goes on, bit for bit.

A run writes checkpoints, and one that is stopped saves its last whole step.
The same call then goes on from there: same rows, same dropout, same moments of AdamW.
Here one run is left alone, another is stopped in the middle, and both end with the same adapter.
Takes half a minute on two CPU cores.
"""

# %%
import os
import signal
import threading
import time
from pathlib import Path

import mlx_qlora as mq

MODEL = "smollm2-135m"
OUTPUT = Path("outputs/resume")
SAVE_STEPS = 2
ROWS = [
    {
        "instruction": "Write the amount in house style.",
        "input": f"{n} euros",
        "output": f"EUR {n:,}.00",
    }
    for n in range(1_000, 900_000, 80_000)
]

# %% [markdown]
# Both runs have the defaults, but a checkpoint every second step. Dropout is on: its masks have to
# be drawn again. `resume_from_checkpoint` is `auto` by default; `none` starts from the beginning.


# %%
def run(folder: Path, resume: str) -> mq.TrainResult:
    """Trains a fresh model, as a new process would."""
    model, tokenizer = mq.load(MODEL)
    config = mq.RunConfig(
        checkpointing=mq.CheckpointingConfig(
            output_dir=str(folder), save_steps=SAVE_STEPS, resume_from_checkpoint=resume
        ),
        logging=mq.LoggingConfig(logging_steps=1),
    )
    return mq.fine_tune(model, tokenizer, mq.read_examples(ROWS, tokenizer), config=config)


def adapter(folder: Path) -> bytes:
    """The file of weights that a run leaves."""
    return (folder / "adapter_model.safetensors").read_bytes()


unbroken = run(OUTPUT / "unbroken", resume="none")
unbroken

# %% [markdown]
# Now a run that somebody stops. A thread waits for a new checkpoint and then sends the signal of
# Ctrl-C, which is also that of a notebook's stop button. The run saves its step and raises
# `KeyboardInterrupt`.

# %%
# A shell that starts a script in the background has it ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
checkpoint = OUTPUT / "stopped" / f"checkpoint-{SAVE_STEPS}"
began = time.time()


def press_ctrl_c() -> None:
    """Stops the run as soon as its first checkpoint is there, not one of an earlier run."""
    state = checkpoint / "resume_state.json"
    while not (state.exists() and state.stat().st_mtime > began):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=press_ctrl_c, daemon=True).start()
stopped = None
try:
    run(OUTPUT / "stopped", resume="none")
except KeyboardInterrupt as interrupt:
    stopped = interrupt
print(f"stopped: {stopped}")

# %% [markdown]
# The stop was a real one: steps were missing, and there was no adapter to use. The same call
# finishes the run.

# %%
saved = sorted(int(path.name.split("-")[1]) for path in (OUTPUT / "stopped").glob("checkpoint-*"))
resumed = run(OUTPUT / "stopped", resume="auto")
resumed

# %%
losses = [[r["loss"] for r in x.log_history if "loss" in r] for x in (unbroken, resumed)]
print(f"stopped after step {saved[-1]} of {resumed.steps}")
for step, pair in enumerate(zip(*losses), start=1):
    print(f"step {step}  unbroken {pair[0]:.6f}  resumed {pair[1]:.6f}")

assert stopped is not None, "the run ended before it could be stopped"
assert SAVE_STEPS <= saved[-1] < resumed.steps == len(losses[0])
assert losses[0] == losses[1]
assert adapter(OUTPUT / "unbroken") == adapter(OUTPUT / "stopped")
