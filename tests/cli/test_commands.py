"""What the commands do: train, its dry and quiet runs, plan, generate, and all their JSON."""

import json
import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from support.command_line import QUICK, printed_json
from transformers import AutoTokenizer

import mlx_qlora as mq
from mlx_qlora.cli import COMMANDS, main
from mlx_qlora.commands import RUN
from mlx_qlora.config import SECTIONS, build, read_yaml
from mlx_qlora.data.chats import alpaca_prompt
from mlx_qlora.loading import as_taught
from mlx_qlora.model.lora import trainable_count
from mlx_qlora.train.config import TrainingConfig


def test_every_command_runs_something():
    assert {*COMMANDS} == {*RUN, "completion"}
    assert {section for command in COMMANDS.values() for section in command.reads} == {*SECTIONS}


# ---- train -------------------------------------------------------------------------------------


def test_train_says_nothing_if_asked_and_leaves_what_generate_and_train_open(train, model, capsys):
    assert main([*train, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert Path("out/report.html").is_file()
    assert build(read_yaml(Path("out/run.yaml"))).lora.r == 2
    assert mq.load(model, adapter="out")[0].lora_config.r == 2
    weights = load_file("out/adapter_model.safetensors")
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)

    ask = ["generate", "--model", str(model), "--adapter", "out", "--prompt", "Say"]
    ask += ["--seed", "1", "model.bits=null", "generation.max_new_tokens=4"]
    answers = []
    for _ in range(2):
        assert main(ask) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()

    # The adapter's run names the model.
    assert main([train[0], *train[3:], "--adapter", "out", "--output-dir", "more"]) == 0
    assert build(read_yaml(Path("more/run.yaml"))).lora.r == 2  # the adapter's own


def test_a_run_says_what_it_does_before_and_after_the_training(finished, capsys):
    """Started again when it is done, it says so and not how fast it was."""
    assert "report    out/report.html\n" in finished.err
    assert "next      mlx-qlora generate --adapter out --" in finished.err
    assert "          mlx-qlora export --adapter out --" in finished.err
    assert "done      0." in finished.err and "tokens/s" in finished.err
    assert main(finished.words) == 0
    longer = "to train it longer pass --adapter out, and another --output-dir"
    ended = f"done      step 2 was the last one; adapter in out; {longer}\n"
    assert ended in capsys.readouterr().out


def test_a_quiet_run_still_warns(finished, capsys):
    damaged = Path("out/checkpoint-2/optimizer.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main([*finished.words, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning   ") and "checkpoint-2" in err


def test_a_run_says_how_often_it_sees_its_rows(train, capsys):
    assert main([*train, "--dry-run", "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"length    2 steps: 0.67 passes over 24 examples, about 0\.\d seconds", shown)
    assert "warning" not in shown
    words = [*train, "--dry-run", "--quiet", "--batch-size", "24"]
    assert main([*words, "training.warmup_steps=30", "training.max_steps=30"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "training.warmup_steps=30 is all of the run's 30 steps" in warnings[0]
    assert warnings[0].endswith("; set training.warmup_steps=3")
    assert "30 passes over 24 examples learn them by heart; set training.max_steps=3" in warnings[1]


# ---- dry runs ----------------------------------------------------------------------------------


def test_a_dry_run_shows_the_first_batch_and_writes_nothing(train, tmp_path, capsys):
    assert main([*train, "--dry-run", "--refused", "refused.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "30 rows read, 30 kept" in shown and "predicted peak" in shown
    assert len(re.findall(r" tokens, \d+ supervised\n", shown)) == 2 and "⟦It is" in shown
    assert "would be trained for 2 steps; nothing was trained, and nothing but the token" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_a_dry_run_says_the_loss_that_training_begins_with(finished, capsys):
    assert main([*finished.words, "--dry-run", "--json", "--output-dir", "other"]) == 0
    first_batch = printed_json(capsys)["first_batch"]
    first = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    assert first_batch["loss"] == pytest.approx(first["loss"], abs=1e-5)


def test_a_dry_run_knows_where_a_run_would_go_on(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert main([*finished.words, "--dry-run", "--json"]) == 0
    assert printed_json(capsys)["resume_from_checkpoint"] == "out/checkpoint-2"
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("lora.target_modules=[nothing]", "nothing"),
        ("checkpointing.resume_from_checkpoint=elsewhere", "elsewhere"),
        ("data.validation_path=away.jsonl", "away.jsonl"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(train, wrong, message, capsys):
    ends = []
    for words in ([*train, wrong, "--dry-run"], [*train, wrong]):
        assert main(words) == 2
        ends.append(capsys.readouterr().err)
    assert ends[0] == ends[1] and message in ends[0]


# ---- JSON --------------------------------------------------------------------------------------


def test_json_of_a_run_has_its_figures_and_leaves_standard_output_alone(finished):
    assert finished.out.count("\n") == 1
    result = json.loads(finished.out)
    assert "plan" in finished.err and "adapter in out" in finished.err
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert result["output_dir"] == "out" and result["steps"] == 2
    assert result["eval_loss"] == last["eval_loss"]
    scores = result["test_scores"]
    assert scores["before"]["n_tokens"] == scores["after"]["n_tokens"] > 0
    assert scores["before"]["loss"] != scores["after"]["loss"]


def test_json_of_the_commands_before_a_run(train, model, capsys):
    assert main(["plan", "--model", str(model), "--json"]) == 0
    plan = printed_json(capsys)
    assert plan["total_bytes"] == sum(plan["parts"].values()) and plan["fits"] is True

    assert main(["inspect", "rows.jsonl", "--model", str(model), "--json"]) == 0
    inspected = printed_json(capsys)
    assert inspected["sources"][0]["kept"] == 30 and sum(inspected["rows"].values()) == 30

    assert main(["train", "--print-config", "lora.r=3", "--json"]) == 0
    assert printed_json(capsys)["lora"]["r"] == 3

    sweep = ["sweep", "--model", str(model), "--data", "rows.jsonl", "--output-dir", "s", *QUICK]
    sweep += ["data.split=[0.6,0.4,0]", "--learning-rates", "1e-4,1e-3", "--rungs", "1", "--json"]
    assert main(sweep) == 0
    assert printed_json(capsys) == json.loads(Path("s/sweep.json").read_text())


def test_json_of_the_commands_after_a_run(finished, capsys):
    few = ["generation.max_new_tokens=4", "generation.temperature=0"]
    asked = ["generate", "--adapter", "out", "--instruction", "Say 3."]
    assert main([*asked, *few, "--json"]) == 0
    answer = printed_json(capsys)
    assert main([*asked, *few]) == 0
    assert capsys.readouterr().out == answer["text"] + "\n"
    assert 0 < answer["new_tokens"] <= 4

    judge = ["evaluate", "--adapter", "out", "--data", "rows.jsonl", "--answers", "0", "--json"]
    assert main(judge) == 0
    assert printed_json(capsys)["rows_scored"] == 30

    assert main(["merge", "--adapter", "out", "--output-dir", "merged", "--json"]) == 0
    merged = printed_json(capsys)
    sizes = [path.stat().st_size for path in Path("merged").iterdir()]
    assert merged["folder"] == "merged" and merged["bytes"] == sum(sizes)

    assert main(["export", "--adapter", "out", "--output-dir", "e", "--portable", "--json"]) == 0
    assert printed_json(capsys) == {"format": "portable", "path": "e"}

    assert main(["push", "out", "me/mine", "--dry-run", "--json"]) == 0
    assert "adapter_model.safetensors" in [name for name, _ in printed_json(capsys)["files"]]


# ---- plan and generate -------------------------------------------------------------------------


def test_plan_prints_the_trainable_parameters(model, capsys):
    assert main(["plan", "--model", str(model), "model.bits=null", "lora.r=2"]) == 0
    adapted, _ = mq.load(model)
    mq.add_lora(adapted, mq.LoraConfig(r=2))
    assert f"trainable parameters  {trainable_count(adapted):,}" in capsys.readouterr().out


def test_a_plan_of_rows_is_that_of_their_run(train, model, capsys):
    of_run = ["--model", str(model), "--data", "rows.jsonl", "--max-steps", "4", "model.bits=null"]
    assert main(["plan", *of_run, "--json"]) == 0
    planned = printed_json(capsys)
    assert main(["train", *of_run, "--dry-run", "--output-dir", "o", "--json"]) == 0
    of_run_itself = printed_json(capsys)["plan"]
    assert planned["parts"] == of_run_itself["parts"] and planned["documents"] == ""
    assert planned["run_seconds"] > 0


def test_a_plan_leaves_the_file_of_refused_rows_to_the_run(train, model, capsys):
    Path("refused.jsonl").write_text("kept\n")
    Path("run.yaml").write_text("data: {path: rows.jsonl, refused_path: refused.jsonl}\n")
    with open("rows.jsonl", "a") as file:
        file.write("{}\n")
    assert main(["plan", "--model", str(model), "--config", "run.yaml"]) == 0
    assert Path("refused.jsonl").read_text() == "kept\n"
    Path("rows.jsonl").unlink()
    assert main(["plan", "--model", str(model), "--config", "run.yaml"]) == 2
    assert "; data.path=null plans without rows" in capsys.readouterr().err
    assert main(["plan", "--model", str(model), "--config", "run.yaml", "data.path=null"]) == 0


def test_a_plan_of_several_processes_divides_a_step_that_is_left_to_it(train, model, capsys):
    of_run = ["plan", "--model", str(model), "--data", "rows.jsonl", "--processes", "2", "--json"]
    plans = []
    for size in ([], ["--batch-size", "2"]):
        assert main([*of_run, *size]) == 0
        plans.append(printed_json(capsys))
    assert plans[0]["parts"] == plans[1]["parts"], "4 examples in a step, 2 in each process"


def test_a_plan_without_rows_says_what_it_has_no_use_for(model, capsys):
    assert main(["plan", "--model", str(model), "--epochs", "7", "data.max_length=64"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "training.num_train_epochs=7 is not used: there are no rows; pass --data" in printed
    assert "data.max_length=64 is not used" not in printed and "64 tokens" in printed


def test_generate_asks_an_instruction_as_training_did(chat_folder, capsys):
    folder = str(chat_folder)
    settings = ["generation.temperature=0", "generation.max_new_tokens=6", "model.bits=null"]
    asked = ["--instruction", "count", "--input", "7"]
    assert main(["generate", "--model", folder, *asked, *settings]) == 0
    answer = capsys.readouterr().out
    model, tokenizer = mq.load(folder)
    prompt = "### Instruction:\ncount\n\n### Input:\n7\n\n### Response:\n"
    expected = mq.generate(model, tokenizer, prompt, max_new_tokens=6, temperature=0)
    assert answer == expected + "\n"
    assert main(["generate", "--model", folder, "--prompt", prompt, "--raw", *settings]) == 0
    assert capsys.readouterr().out == answer
    assert main(["generate", "--model", folder, "--prompt", prompt, *settings]) == 0
    assert capsys.readouterr().out != answer, "without --raw the chat template goes around it"


def test_an_adapter_is_used_with_the_settings_of_its_run_but_for_what_is_typed(
    finished, model, capsys
):
    use = ["generate", "--adapter", "out", "--print-config", "--json"]
    assert main(use) == 0
    config = printed_json(capsys)
    assert (config["model"]["source"], config["model"]["bits"]) == (str(model), None)
    assert (config["model"]["adapter"], config["generation"]["top_k"]) == ("out", 7)
    assert config["training"]["num_train_epochs"] == 3.0  # of the run, no use for it here
    assert main([*use, "model.bits=4", "generation.top_k=50"]) == 0  # the defaults, but typed
    config = printed_json(capsys)
    assert (config["model"]["bits"], config["generation"]["top_k"]) == (4, 50)
    assert main([*use, "--model", "org/other"]) == 0
    config = printed_json(capsys)
    assert (config["model"]["source"], config["generation"]["top_k"]) == ("org/other", 50)


@pytest.mark.parametrize("command", ["train", "plan", "inspect"])
def test_an_adapters_rows_are_trained_on_as_its_run_divided_and_read_them(
    finished, capsys, command
):
    record = Path("out/run.yaml")
    values = read_yaml(record)
    values["training"] |= {"seed": 7, "objective": "dpo", "beta": 0.3, "learning_rate": 0.5}
    values["data"] |= {"max_length": 12, "train_on": "all", "refused_path": "r.jsonl"}
    record.write_text(json.dumps(values))
    words = [command, "--adapter", "out", "--print-config", "--json"]
    assert main(words) == 0
    config = printed_json(capsys)
    data, training = config["data"], config["training"]
    assert (data["path"], data["max_length"]) == (values["data"]["path"], 12)
    assert (data["refused_path"], data["split"]) == (None, values["data"]["split"])
    assert (training["seed"], training["objective"], training["beta"]) == (7, "dpo", 0.3)
    assert training["learning_rate"] == TrainingConfig().learning_rate
    assert main([*words, "--max-length", "2048", "training.seed=0"]) == 0  # defaults, but typed
    config = printed_json(capsys)
    assert (config["data"]["max_length"], config["training"]["seed"]) == (2048, 0)
    assert main([*words, "--data", "other.jsonl"]) == 0
    config = printed_json(capsys)
    assert (config["data"]["max_length"], config["training"]["seed"]) == (2048, 0)


def test_an_adapter_is_trained_on_with_nothing_but_a_new_folder(finished, capsys):
    assert main(["train", "--adapter", "out", "--output-dir", "more", "--max-steps", "1"]) == 0
    first, second = (read_yaml(f"{folder}/run.yaml")["data"] for folder in ("out", "more"))
    assert second == first
    assert main(["export", "--adapter", "more", "--output-dir", "more"]) == 2
    assert "holds the adapter itself" in capsys.readouterr().err


# ---- a system message of the data ----------------------------------------------------------------


def test_a_model_is_asked_with_the_system_message_that_its_rows_had(chat_folder, tmp_path, capsys):
    words = ["generate", "--model", str(chat_folder), "--seed", "1", "model.bits=null", "--json"]
    words += ["--instruction", "Say", "generation.max_new_tokens=8", "data.system=Be brief."]
    assert main(words) == 0
    answer = printed_json(capsys)["text"]
    model, tokenizer = mq.load(chat_folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say"}]
    assert answer == mq.generate(model, tokenizer, turns, seed=1, max_new_tokens=8)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "run.yaml").write_text("data: {system: Be brief., template: chat}\n")
    for system, wanted in ((None, "Be brief."), ("Be long.", "Be long.")):
        values = {"model": {"adapter": str(adapter)}, "data": {"system": system}}
        data = as_taught(build(values)).data
        assert (data.system, data.template) == (wanted, "chat")


@pytest.fixture(scope="module")
def taught(chat_folder, tmp_path_factory):
    """Adapters of a model that chats: of instructions, and of chats."""
    turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "a"}]
    rows = {"alpaca": {"instruction": "Say", "output": "a"}, "messages": {"messages": turns}}
    place = tmp_path_factory.mktemp("taught")
    for form, row in rows.items():
        (place / f"{form}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
        words = ["train", "--model", str(chat_folder), "--data", str(place / f"{form}.jsonl")]
        words += ["--max-steps", "1", "model.bits=null", "--output-dir", str(place / form)]
        assert main([*words, "--quiet"]) == 0
    return place


@pytest.mark.parametrize("flag", ["--prompt", "--instruction"])
@pytest.mark.parametrize("form", ["alpaca", "messages"])
def test_a_question_is_written_as_the_rows_were(form, flag, taught, chat_folder, capsys):
    ask = ["generate", "--adapter", str(taught / form), flag, "Say", "--seed", "1", "--json"]
    assert main(ask) == 0
    answer = printed_json(capsys)["text"]
    model, tokenizer = mq.load(chat_folder, adapter=taught / form)
    turns = [{"role": "user", "content": "Say"}]
    asked = {"alpaca": alpaca_prompt("Say"), "messages": turns}
    assert answer == mq.generate(model, tokenizer, asked[form], seed=1)
    other = asked["messages" if form == "alpaca" else "alpaca"]
    assert answer != mq.generate(model, tokenizer, other, seed=1)
    asked_so = {"--prompt": "data.template=chat", "--instruction": "data.template=alpaca"}[flag]
    assert main([*ask, asked_so]) == 0, "unless another form is named"
    wanted = turns if flag == "--prompt" else alpaca_prompt("Say")
    assert printed_json(capsys)["text"] == mq.generate(model, tokenizer, wanted, seed=1)


@pytest.mark.parametrize("form", ["alpaca", "messages"])
def test_a_merged_model_chats_as_the_rows_were(form, taught, tmp_path, capsys):
    is_text, use = form == "alpaca", ["--adapter", str(taught / form), "--output-dir"]
    assert main(["merge", *use, str(tmp_path / "merged")]) == 0
    assert ("template " in capsys.readouterr().out) == is_text
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    turns = [{"role": "user", "content": "Say"}]
    text = merged.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.removeprefix("<|bos|>").startswith("### Instruction:") == is_text
    if is_text:
        assert text == "<|bos|>" * text.startswith("<|bos|>") + alpaca_prompt("Say")
    assert main(["export", *use, str(tmp_path / "gguf"), "--gguf-model"]) == 0
    assert ("### Response:" in (tmp_path / "gguf" / "Modelfile").read_text()) == is_text


def test_rows_are_read_by_the_names_that_an_adapters_rows_had(chat_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"own": {"q": "Say ", "a": "b"}, "usual": {"text": "b"}, "other": {"frage": "b"}}
    rows["own"] |= {"prompt": "no", "completion": "no"}
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    own = ["--data", "own.jsonl", "data.columns={prompt: q, completion: a}", "model.bits=null"]
    words = ["train", "--model", str(chat_folder), *own, "--max-steps", "1", "--quiet"]
    assert main([*words, "--output-dir", "out"]) == 0
    for name, code in (("own", 0), ("usual", 0), ("other", 2)):
        words = ["evaluate", "--adapter", "out", "--data", f"{name}.jsonl", "--answers", "0"]
        assert main([*words, "data.cache_dir=null"]) == code, name
    merge = ["merge", "--adapter", "out", "--requantize", "4", "model.group_size=32"]
    for name in ("own", "usual"):
        assert main([*merge, "--data", f"{name}.jsonl", "--output-dir", f"m-{name}"]) == 0
    # Over a base in groups of 32 those are taken, unless others are typed; 64 does not fit here.
    again = [*merge[:-1], "--model", "m-own", "--data", "own.jsonl", "--output-dir", "n"]
    assert main(again) == 0
    assert json.loads(Path("n/config.json").read_text())["quantization"]["group_size"] == 32
    assert main([*again, "model.group_size=64"]) == 2


def test_a_run_keeps_the_system_message_that_its_rows_share(chat_folder, tmp_path, capsys):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say"}]
    row = json.dumps({"messages": [*turns, {"role": "assistant", "content": "a"}]})
    rows, adapter = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(f"{row}\n" * 8)
    words = ["train", "--model", str(chat_folder), "--data", str(rows), "--max-steps", "2"]
    assert main([*words, "--output-dir", str(adapter), "model.bits=null"]) == 0
    assert "'Be brief.' begins every row" in capsys.readouterr().out
    assert (
        main(["generate", "--adapter", str(adapter), "--prompt", "Say", "--seed", "1", "--json"])
        == 0
    )
    answer = printed_json(capsys)["text"]
    model, tokenizer = mq.load(chat_folder, adapter=adapter)
    assert answer == mq.generate(model, tokenizer, turns, seed=1)
    again = ["train", "--config", str(adapter / "run.yaml"), "--output-dir", str(tmp_path / "b")]
    assert main(again) == 0
    assert "data.system" not in capsys.readouterr().err


@pytest.mark.parametrize("system", ["be\0brief", "[" * 300, "Be brief. " * 30_000])
def test_a_system_message_that_no_record_holds_is_not_kept(system, chat_folder, tmp_path, capsys):
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "Say"}]
    row = json.dumps({"messages": [*turns, {"role": "assistant", "content": "a"}]})
    rows, adapter = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(f"{row}\n" * 8)
    words = ["train", "--model", str(chat_folder), "--data", str(rows), "--max-steps", "1"]
    words += ["data.truncation=left-context", "data.max_length=512"]
    assert main([*words, "--output-dir", str(adapter), "model.bits=null", "lora.r=2"]) == 0
    assert "the message of every row is not kept" in capsys.readouterr().out
    assert main(["generate", "--adapter", str(adapter), "--prompt", "Say", "--raw"]) == 0
