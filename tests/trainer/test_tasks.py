"""Problems, their split, their rewards, and the format of their file."""

import json

import pytest
from minirl.config import TaskConfig
from minirl.errors import MiniRLError
from minirl.models import load_model
from minirl.rewards import read_answer
from minirl.tasks import ArithmeticTask, JsonlTask, Problem, ProblemStream, make_task
from minirl.tokenizer import character_tokenizer, encode_prompt
from transformers import AutoModelForCausalLM, Qwen3Config


def operands(problem):
    return frozenset(problem.prompt.rstrip("=").split("+"))


def test_held_out_sums_are_not_trained_on_in_any_order():
    task = make_task(TaskConfig(max_operand=49))
    assert len(task.train) + len(task.held_out) == 50 * 50
    assert not {operands(problem) for problem in task.train} & {operands(problem) for problem in task.held_out}
    assert 0.05 < len(task.held_out) / 2500 < 0.15
    assert len(make_task(TaskConfig(max_operand=49, held_out_fraction=0.5)).held_out) > 1000


def test_arithmetic_reward_is_of_the_whole_response():
    task, problem = ArithmeticTask(TaskConfig()), Problem("12+7=", "19")
    rewards = {text: task.reward(problem, text) for text in ("19", "1", "190", "19=", "", "019")}
    assert rewards == {"19": 1.0, "1": 0.0, "190": 0.0, "19=": 0.0, "": 0.0, "019": 0.0}


def test_stream_is_epochs_of_all_problems():
    problems = [Problem(str(number), "") for number in range(5)]
    stream = ProblemStream(problems, 0, "train")
    first, second = stream.take(0, 5), stream.take(5, 5)
    assert set(first) == set(second) == set(problems)
    assert first != second
    assert stream.take(3, 4) == first[3:] + second[:2]
    assert ProblemStream(problems, 0, "train").take(7, 2) == second[2:4]
    assert ProblemStream(problems, 1, "train").take(0, 5) != first


def test_character_tokenizer(tmp_path):
    tokenizer = character_tokenizer(ArithmeticTask.characters)
    ids = encode_prompt(tokenizer, "12+7=")
    assert len(ids) == 5
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12+7="
    assert encode_prompt(tokenizer, "1x")[1] == tokenizer.unk_token_id


def write_lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return TaskConfig(kind="jsonl", path=str(path), held_out_fraction=0.3)


def test_jsonl(tmp_path):
    records = [{"prompt": f"What is {n}/2?\u2028", "answer": f"\\frac{{{n}}}{{2}}"} for n in range(20)]
    records.append({"prompt": [{"role": "user", "content": "Three times the root of 2?"}], "answer": "3\\sqrt{2}"})
    task = make_task(write_lines(tmp_path / "problems.jsonl", *records))
    problems = [*task.train, *task.held_out]
    assert len(problems) == 21
    assert task.train
    assert task.held_out
    (half,) = [problem for problem in problems if problem.prompt == "What is 1/2?\u2028"]
    assert task.reward(half, "so it is $0.5$") == 1.0
    assert task.reward(half, "so it is $0.6$") == 0.0
    assert task.reward(half, "") == 0.0
    (root,) = [problem for problem in problems if isinstance(problem.prompt, list)]
    assert task.reward(root, "\\boxed{3\\sqrt{2}}") == 1.0
    assert task.reward(root, "\\boxed{3}") == 0.0


def test_answers_in_several_spellings():
    for answer in ("1/2", "$\\frac12$", "\\boxed{0.5}"):
        assert read_answer(answer).reward("The answer is $1/2$.") == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object with the keys prompt and answer"),
        ('{"prompt": "a"}', "must be an object with the keys prompt and answer"),
        ('{"prompt": 3, "answer": "1"}', "prompt is 3: it must be a string, or a list of messages"),
        ('{"prompt": "", "answer": "1"}', "prompt is empty"),
        ('{"prompt": [], "answer": "1"}', "prompt is empty"),
        ('{"prompt": [{"role": "user"}], "answer": "1"}', "it must be a string, or a list of messages"),
        ('{"prompt": "a", "answer": null}', "answer is None: it must be a string or a number"),
        ('{"prompt": "a", "answer": true}', "answer is True: it must be a string or a number"),
        ('{"prompt": "a", "answer": NaN}', "answer is nan: it must be a string or a number"),
        ('{"prompt": "a", "answer": 1e5000}', "answer is '1E+5000': its exponent must be below 1000"),
        ('{"prompt": "a", "answer": ""}', "answer is '': it must be mathematics"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "1"}}\n\n{line}\n')
    with pytest.raises(MiniRLError) as error:
        JsonlTask(TaskConfig(kind="jsonl", path=str(path)))
    assert f"{path}, line 3: " in str(error.value)
    assert message in str(error.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(MiniRLError, match=r"cannot read task\.path .*: No such file"):
        make_task(TaskConfig(kind="jsonl", path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(MiniRLError, match=r"leaves no .* problems of its 1"):
        make_task(write_lines(tmp_path / "one.jsonl", {"prompt": "a", "answer": "1"}))


def test_answers_that_are_numbers_are_read_as_they_stand(tmp_path):
    answers = ["20", "-3", "20.50", "1e-5", "12345678901234567890"]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(f'{{"prompt": "{n}", "answer": {answers[n % 5]}}}' for n in range(20)))
    task = make_task(TaskConfig(kind="jsonl", path=str(path), held_out_fraction=0.3))
    problems = {problem.prompt: problem for problem in [*task.train, *task.held_out]}
    for number, (right, wrong) in enumerate(
        [("20", "21"), ("-3", "3"), ("20.5", "20"), ("0.00001", "1"), ("12345678901234567890", "12345678901234567000")]
    ):
        assert task.reward(problems[str(number)], f"\\boxed{{{right}}}") == 1.0
        assert task.reward(problems[str(number)], f"\\boxed{{{wrong}}}") == 0.0


def test_text_answers_are_graded_as_text(tmp_path):
    """math-verify reads a word as a product of letters, so a sentence with the word would never be equal."""
    records = [{"prompt": f"Capital {n}?", "answer": ["Paris", "yes", "A"][n % 3]} for n in range(30)]
    task = make_task(write_lines(tmp_path / "problems.jsonl", *records))
    for problem in [*task.train, *task.held_out]:
        assert task.reward(problem, f"The answer is {problem.answer}.") == 1.0
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, f"\\boxed{{{problem.answer}}}") == 1.0
        assert task.reward(problem, "The answer is Rome.") == 0.0


@pytest.mark.parametrize("answer", ["?", "½", "\\frac{1}{", "sqrt(2)"])
def test_an_answer_that_cannot_be_graded_is_refused_with_its_line(tmp_path, answer):
    config = write_lines(tmp_path / "problems.jsonl", {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": answer})
    with pytest.raises(MiniRLError) as error:
        make_task(config)
    assert f"line 2: answer is {answer!r}: it must be mathematics" in str(error.value)


def test_equal_prompts_are_told_as_what_they_are(tmp_path):
    records = [{"prompt": "What is 1+1?", "answer": "2"}] * 50
    with pytest.raises(
        MiniRLError, match=r"problems of its 50, which have 1 different prompts .* more different"
    ) as error:
        make_task(write_lines(tmp_path / "problems.jsonl", *records))
    assert "held_out_fraction" not in str(error.value)  # no other value would help


def test_chat_needs_a_template():
    with pytest.raises(MiniRLError, match="chat template"):
        encode_prompt(character_tokenizer("ab"), [{"role": "user", "content": "a"}])


def test_chat_template_is_used():
    tokenizer = character_tokenizer("abAQ:")
    tokenizer.chat_template = (
        "{% for message in messages %}Q:{{ message.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "ab"}])
    assert tokenizer.decode(ids) == "Q:abA:"


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(MiniRLError, match="cannot load a model from"):
        load_model(str(tmp_path))


def test_a_tokenizer_that_is_not_its_models(tmp_path):
    """Otherwise the first token beyond the embedding would cause an index error, or end vLLM's process."""
    config = Qwen3Config(vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = character_tokenizer("abcdefg")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        MiniRLError, match=rf"tokenizer of .* has {len(tokenizer)} tokens and its model 6: the model must have"
    ):
        load_model(str(tmp_path))
