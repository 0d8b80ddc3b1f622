"""The README's table says how the library compares, which cases it shows, and which results are old."""

import pytest
from headlines import Comparison, Work, render_readme
from measured_case import contender, measured_case, measured_record, row

WORK = Work("Some work", "512 tokens", result="some_op", what="forward + backward", shape={"vocab_size": 151_936})
EAGER, COPY = Comparison(WORK, "ours", "eager", "eager PyTorch"), Comparison(WORK, "ours", "copy", "a copy")


def test_a_row_says_faster_or_slower_with_both_times_and_both_peaks():
    text = render_readme({"some_op": measured_record()}, (EAGER, COPY))
    cells = ["50.0 ms", "800 ms", "16.0× faster", "1.0 MiB", "1,024 MiB", "Some CPU, avx2"]
    assert row(text, "Some work | eager") == ["Some work", "eager PyTorch", *cells]
    assert row(text, "Some work | a copy")[2:5] == ["50.0 ms", "20.0 ms", "2.5× slower"]
    assert text.count("* Some work: 512 tokens.") == 1


def test_times_of_a_row_share_a_unit_and_small_peaks_are_no_zeros():
    contenders = [contender("ours", "ours", [2.0], 1000), contender("eager", "peer", [30.0], None)]
    text = render_readme({"some_op": measured_record(measured_case(contenders=contenders))}, (EAGER,))
    assert row(text, "Some work")[2:7] == ["2 s", "30.0 s", "15.0× faster", "< 0.1 MiB", "Some CPU, avx2"]


def test_old_results_are_marked_and_equal_notes_are_told_once():
    old = measured_case(source={"added_by": "fedcba98", "note": "measured before a change"})
    text = render_readme({"some_op": measured_record(old)}, (EAGER, COPY))
    assert row(text, "Some work | eager")[-1] == row(text, "Some work | a copy")[-1] == "Some CPU, avx2 ¹"
    assert text.count("¹ Measured before a change.") == 1
    assert "¹" not in render_readme({"some_op": measured_record()}, (EAGER,))


def test_an_alternative_that_does_less_is_named():
    liger = measured_case()
    liger["contenders"][1]["name"] = "Liger"
    text = render_readme({"some_op": measured_record(liger)}, (Comparison(WORK, "ours", "Liger", "Liger"),))
    assert "These compute no entropy: Liger." in text
    assert "no entropy" not in render_readme({"some_op": measured_record()}, (EAGER,))


def test_an_alternative_that_did_not_run_is_an_error():
    results = {"some_op": measured_record()}
    with pytest.raises(ValueError, match=r"'absent' did not run .* \(absent is not installed\)"):
        render_readme(results, (Comparison(WORK, "ours", "absent", "an absent one"),))
    with pytest.raises(ValueError, match="no contender 'unknown'; its contenders are ours, eager, absent, copy"):
        render_readme(results, (Comparison(WORK, "ours", "unknown", "an unknown one"),))


@pytest.mark.parametrize(
    ("results", "number"),
    [({}, 0), ({"some_op": measured_record(measured_case(threads=1))}, 0),
     ({"some_op": measured_record(measured_case(), measured_case())}, 2)],
    ids=["no_file", "no_case", "two_cases"],
)  # fmt: skip
def test_a_headline_without_its_one_case_is_an_error(results, number):
    with pytest.raises(ValueError, match=rf"some_op\.json has {number} cases"):
        render_readme(results, (EAGER,))
