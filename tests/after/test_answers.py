"""Each metric against values computed by hand or by the library that papers use."""

import math
import sys

import pytest
from support.command_line import python
from support.tiny_folder import write_tokenizer

import mlx_qlora as mq
from mlx_qlora.after import answer_metrics as on
from mlx_qlora.data.encode import encode_prompt
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer

PAIRS = [
    ("the cat sat on the mat", "the cat lay on a mat"),
    ("Paris.", "The capital of France is Paris."),
    ("", "something"),
    ("1. a\n2. b", "- a\n- b"),
    ("The SAME text!", "the same text"),
]


def test_exact_match_forgives_white_space_and_nothing_else():
    assert on.exact_match(" a  b\n", "a b") == 1
    assert on.exact_match("A b", "a b") == 0
    assert on.exact_match("a b.", "a b") == 0


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_rouge_l_is_rouge_score_s_own_on_ascii(prediction, reference):
    from rouge_score.rouge_scorer import RougeScorer

    wanted = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert on.rouge_l(prediction, reference) == pytest.approx(wanted, abs=1e-12)


def test_rouge_l_by_hand_and_in_other_scripts():
    # "the cat on mat" is common: 4 of 6 words on both sides.
    assert on.rouge_l(*PAIRS[0]) == pytest.approx(4 / 6)
    assert on.rouge_l("кошка сидит", "кошка лежит") == pytest.approx(1 / 2)
    assert on.rouge_l("größer", "großer") == 0
    assert (on.rouge_l("...", ""), on.rouge_l("a", "")) == (1, 0)


@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_chrf_is_sacrebleu_s(prediction, reference):
    import sacrebleu

    wanted = sacrebleu.sentence_chrf(prediction, [reference]).score / 100
    assert on.chrf(prediction, reference) == pytest.approx(wanted, abs=1e-12)


def test_chrf_by_hand():
    # "abc" / "abd", n = 1: P = R = 2/3; n = 2: 1/2; n = 3: 0; longer n-grams do not exist.
    assert on.chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert (on.chrf("", " "), on.chrf("same", "same")) == (1, 1)


def test_lengths():
    assert on.relative_length("abcd ", "ab") == 2
    assert (on.relative_length("", "ab"), on.relative_length("ab", "")) == (0, 2)


def test_style_similarity_is_a_cosine_of_3_grams():
    # " ab", "abc", "bc " against " ab", "abd", "bd ": one of three in common.
    assert on.style_similarity("abc", "abd") == pytest.approx(1 / 3)
    # " aa", "aaa" x 2, "aa " against " aa", "aaa", "aa ": 1 + 2 + 1 over sqrt(6 * 3).
    assert on.style_similarity("aaaa", "aaa") == pytest.approx(4 / math.sqrt(18))
    assert on.style_similarity("a  b", "a b") == pytest.approx(1)
    assert (on.style_similarity("", ""), on.style_similarity("", "abc")) == (1, 0)


def test_repetition_is_the_share_of_n_grams_seen_before():
    assert on.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert on.repetition("x " * 13) == pytest.approx(9 / 10)
    assert on.repetition("a b a b", n=2) == pytest.approx(1 / 3)
    assert on.repetition("three words only") == on.repetition("") == 0
    assert on.excess_repetition("x " * 13, "a b c d a b c d") == pytest.approx(0.9 - 0.2)


def test_a_missing_library_is_named(monkeypatch):
    message = r"need rouge-score and sacrebleu .*; run: pip install .mlx-qlora\[evaluate\]"
    needs = {"sacrebleu.metrics.chrf": on.rouge_l, "rouge_score.rouge_scorer": on.chrf}
    for name, metric in needs.items():  # each metric needs both
        on.scorers.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(mq.ConfigError, match=message):
            patch.setitem(sys.modules, name, None)
            assert not on.has_scorers()
            metric("a", "b")
    on.scorers.cache_clear()


# ---- questions ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("t"), chat=True))


def test_a_question_is_what_stands_before_the_answer_and_has_its_ids(chatty):
    rows = [{"instruction": "Name a colour.", "input": "not red", "output": "Blue, löv."}]
    examples = mq.read_examples(rows, chatty)
    (question,) = on.questions(examples, chatty)
    assert question.reference == "Blue, löv."
    assert question.prompt.endswith("### Response:\n")
    start = len(examples[0]) - question.tokens - 1
    assert encode_prompt(chatty, question.prompt) == examples[0].tokens[:start].tolist()
    assert question.place == "rows:1"


def test_of_a_chat_the_last_answer_is_asked(chatty):
    said = ["one", "ONE", "two", "TWO"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, said)]
    examples = mq.read_examples([{"messages": messages}], chatty)
    (question,) = on.questions(examples, chatty)
    assert question.reference == "TWO"
    assert "ONE" in question.prompt and question.prompt.endswith("<|assistant|>")


def test_rows_without_a_question_or_with_a_cut_answer_are_left_out(chatty):
    row = {"instruction": "Count.", "output": "one two three four five six seven eight"}
    whole = mq.read_examples([row], chatty, mq.DataConfig(train_on="all"))
    plain = mq.read_examples([{"text": "the quick brown fox"}], chatty)
    n = len(whole[0])
    cut = mq.read_examples([row], chatty, mq.DataConfig(max_length=n - 5, truncation="right"))
    for examples in (whole, plain, cut):
        assert len(examples) == 1 and on.questions(examples, chatty) == []


def test_llama_s_own_template_gives_back_its_ids(llama31):
    messages = [{"role": "user", "content": "Hi 🙂"}, {"role": "assistant", "content": "Hello."}]
    examples = mq.read_examples([{"messages": messages}], llama31)
    (question,) = on.questions(examples, llama31)
    start = len(examples[0]) - question.tokens - 1
    assert encode_prompt(llama31, question.prompt) == examples[0].tokens[:start].tolist()
    assert question.reference == "Hello."


def test_the_libraries_load_only_when_they_are_used():
    code = (
        "import sys; import mlx_qlora.after.answer_metrics, mlx_qlora.after.evaluation; "
        "print([m for m in ('rouge_score', 'sacrebleu', 'nltk') if m in sys.modules])"
    )
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")
