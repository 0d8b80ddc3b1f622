"""Grading of responses: mathematics by math-verify, text by comparison, and refused reference answers."""

import pytest
from minirl.rewards import final_answer, read_answer

# (answer, right responses, wrong responses)
GRADED = [
    ("20", ["20", "The answer is 20.", "so \\boxed{20}", "$20.0$"], ["", "21", "\\boxed{2}", "The answer is B."]),
    ("\\frac{1}{2}", ["1/2", "\\boxed{0.5}", "It is $\\frac12$."], ["1", "\\boxed{2}", "half"]),
    ("1 1/2", ["\\boxed{\\frac32}", "1.5", "\\boxed{1 1/2}"], ["1", "\\boxed{1}"]),
    ("1e-5", ["0.00001", "\\boxed{10^{-5}}", "1e-5"], ["1", "\\boxed{-5}"]),
    ("50%", ["50%", "\\boxed{50\\%}", "It is 0.5"], ["\\boxed{5\\%}"]),
    ("12 cm", ["12 cm", "12", "\\boxed{12\\text{ cm}}"], ["13 cm", "cm"]),
    ("20 dollars", ["\\boxed{20}", "The answer is 20 dollars.", "$\\$20$"], ["\\boxed{2}", "dollars"]),
    ("(0,1]", ["$(0,1]$", "\\boxed{(0, 1]}", "The answer is (0,1]."], ["\\boxed{[0,1]}", "\\boxed{(0,1)}"]),
    ("3\\sqrt{2}", ["\\boxed{3\\sqrt{2}}", "The answer is 3\\sqrt{2}.", "$\\sqrt{18}$"], ["\\boxed{3}", "3"]),
    ("2x", ["\\boxed{2x}", "\\boxed{x+x}", "**Answer:** 2x"], ["\\boxed{2y}", "2"]),
    ("p - q", ["\\boxed{p-q}", "The answer is p - q."], ["\\boxed{q-p}"]),
    (
        "Paris",
        ["Paris", "paris.", "The answer is Paris. It is so.", "\\boxed{\\text{Paris}}", "Hm.\n\n**Paris**", "$Paris$"],
        ["\\boxed{Sirap}", "London", "", "The answer is not Paris.", "Paris or London", "\\boxed{}", "Paris\nLondon"],
    ),
    ("yes", ["Yes.", "Answer: Yes", "\\boxed{YES}"], ["no", "\\boxed{sey}", "yes and no"]),
    ("no", ["no", "\\boxed{no}"], ["\\boxed{on}", "yes"]),
    (
        "B",
        [
            *(
                "B",
                "(B)",
                "b.",
                "The answer is B.",
                "Answer: (B)",
                "\\boxed{B}",
                "\\boxed{\\text{(B)}}",
                "**B**",
                "B) Paris",
            ),
            *("The answer is (B) Paris.", "\\boxed{\\textbf{(B)}\\ 12}", "A is wrong.\nThe final answer is: $B$"),
        ],
        ["A", "The answer is A.", "\\boxed{C}", "B or C", "Because", "A) B", "\\boxed{A} B", ""],
    ),
    ("(C)", ["C", "The answer is (C).", "\\boxed{c}"], ["D", "\\boxed{(D)}"]),
    ("\\text{even}", ["even", "\\boxed{\\text{even}}", "\\boxed{even}"], ["odd", "\\boxed{neve}"]),
    ("New  York", ["new york", "The answer is New York."], ["York", "New Orleans"]),
    ("Room 12", ["room 12", "\\boxed{Room 12}"], ["12", "\\boxed{12}", "Room 13"]),
    ("don't know", ["Don't know."], ["know"]),
    ("हिन्दी", ["\\boxed{हिन्दी}", "हिन्दी"], ["हिन"]),
]


@pytest.mark.parametrize(("answer", "right", "wrong"), GRADED, ids=[answer for answer, _, _ in GRADED])
def test_right_responses_have_the_reward_and_wrong_ones_none(answer, right, wrong):
    reference = read_answer(answer)
    assert {response: reference.reward(response) for response in right} == dict.fromkeys(right, 1.0)
    assert {response: reference.reward(response) for response in wrong} == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "20",
            "-7",
            "1/2",
            "3.14",
            "1,234",
            "\\frac12",
            "3\\sqrt{2}",
            "$\\pi$",
            "x^2+1",
            "x=3",
            "x > 3",
            "(0,1)",
            "[0,1)",
        ),
        *("\\{1,2\\}", "1, 2, 3", "50\\%", "$5", "5 apples", "90^\\circ", "\\infty", "12:30", "10!", "1E5", "2 1/3"),
        *("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "Paris", "yes", "A", "x", "(D)", "None", "H2O", "東京", "Life of Pi"),
    ],
)
@pytest.mark.parametrize("response", ["{}", "\\boxed{{{}}}", "The answer is {}.", "Let me see.\n\n**Answer:** {}"])
def test_every_answer_that_is_read_scores_as_a_response(answer, response):
    assert read_answer(answer).reward(response.format(answer)) == 1.0


@pytest.mark.parametrize(
    "answer", ["", " ", "?", "...", "\\frac{1}{", "½", "√2", "∞", "0/0", "1/0", "sqrt(2)", "2pi", "sin x"]
)
def test_an_answer_that_can_be_graded_in_neither_way_is_refused(answer):
    with pytest.raises(ValueError, match="it must be mathematics that math-verify can read, in LaTeX, or text"):
        read_answer(answer)


def test_where_a_response_has_its_answer():
    assert final_answer("The answer is 3. No: \\boxed{4}, not \\boxed{\\frac{5}{6}}. The answer is 7") == "\\frac{5}{6}"
    assert final_answer("The answer is 3.\nNo, the answer is: 4\nYes") == "4"
    assert final_answer("First\n\nsecond \n\n") == "second "
    assert final_answer("\\boxed{cut off") == "\\boxed{cut off"
    assert final_answer("") == ""
