"""The full tables show every contender, bar and source of a result, and leave out columns without figures."""

import pytest
import records
from full_tables import render_full, render_index
from measured_case import measured_case, measured_record, row


def test_values_are_ratios_of_medians():
    case = measured_case()
    assert [records.value(case, bar) for bar in case["bars"]] == pytest.approx([16, 2.5, 2**-9, None])
    assert [records.met(case, bar) for bar in case["bars"]] == [True, False, True, None]


def test_full_report_has_every_contender_and_bar():
    text = render_full(measured_record())
    assert row(text, "eager")[1:] == ["800 ms", "760 ms … 840 ms", "1.2", "1,024.0 MiB", "16.0 ×"]
    assert row(text, "absent")[1] == "not run: absent is not installed"
    verdicts = [
        line.rsplit("|", 2)[1].strip() for line in text.splitlines() if line.startswith("| bfloat16, 2 threads")
    ]
    assert verdicts == ["met", "**missed**", "met", "not measured"]
    assert "torch 2.13.0; transparent huge pages: unknown; load average before the run: 0.01" in text


def test_every_shape_has_its_own_bars():
    other = measured_case(shape={"tokens": 64, "hidden_size": 8, "vocab_size": 100})
    text = render_full(measured_record(measured_case(), other))
    first, second = text.index("T = 512, V = 151,936"), text.index("T = 64, H = 8, V = 100")
    assert "16.0" in text[first:second]
    assert "16.0" in text[second:]


def test_gflops_where_a_case_counts_them():
    text = render_full(measured_record(measured_case(flops=5_000_000_000)))
    assert row(text, "`ours` | 50.0 ms")[3:5] == ["20.0", "100.0"]
    assert "GFLOP/s" in text


def test_a_column_of_zeros_is_left_out():
    text = render_full(measured_record(measured_case(floor_bytes=1000)))
    assert "GB/s" not in text
    assert row(text, "`ours` | 50.0 ms")[2:4] == ["49.0 ms … 51.0 ms", "1.0 MiB"]


def test_each_case_names_its_source():
    old = {"added_by": "fedcba9876543210", "note": "measured before a change"}
    text = render_full(measured_record(measured_case(), measured_case(source=old)))
    assert text.count("\nMeasured at commit 0123456.\n") == 1
    assert text.count("\nAdded by commit fedcba9. Measured before a change.\n") == 1


def test_the_index_counts_bars_and_links_every_result():
    text = render_index({"some_op-cpu": measured_record(), "other": measured_record(measured_case(bars=[]))})
    cells = ["[some_op](some_op-cpu.md)", "Some(R) CPU Processor (2 cores, avx2)", "2 of 4"]
    assert row(text, "[some_op](some_op-cpu.md)") == [*cells, "Measured at commit 0123456."]
    assert row(text, "[some_op](other.md)")[2] == "none"
