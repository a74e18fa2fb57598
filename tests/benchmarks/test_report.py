"""The page of the benchmarks says what the results say."""

import copy
import re

import pytest

from tsdsr.benchmarks.report import DOCS, page, plot, ratio, read_all, table, write_page

MACHINE = {"device": "A CPU", "type": "cpu", "threads": 1, "dtype": "fp32", "torch": "2", "diffusers": "1"}


def row(mode, seconds, size=128, batch=1, **more):
    stages = {"encode": 0.1 * seconds, "step": 0.6 * seconds, "decode": 0.2 * seconds, "rest": 0.1 * seconds}
    found = {"mode": mode, "size": size, "batch": batch, "seconds": seconds, "stages": stages, "flops": 3 * 10**12}
    found |= {"peak_gb": 1.5, "gemm_flops": 1e12, "copy_bytes": 1e10, "weight_bytes": 10**10, "machine": dict(MACHINE)}
    return found | more


def cells(text, mode):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{mode}` |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_is_what_the_committed_results_make():
    results = read_all()
    text = page(results)
    assert results and (DOCS / "benchmarks.md").read_text(encoding="utf-8") == text
    pictures = re.findall(r"\((images/.*?)\)", text)
    assert pictures and all((DOCS / picture).is_file() for picture in pictures)


def test_ratios_shares_and_bounds():
    rows = [row("published", 10.0), row("merged", 5.0), row("int8", 4.0, weight_bytes=35 * 10**9, gemm_flops=1.2e12)]
    text = table(rows, rows)
    assert cells(text, "published")[1:4] == ["1", "1", "2"]
    assert cells(text, "merged")[1:4] == ["0.5", "2", "1"]
    assert cells(text, "merged")[4:] == ["1.50", "3", "**60 %**", "20 %", "10 %", "60 %", "20 %", "10 %"]
    # Weights bind here, and the machine was a fifth faster than beside the baselines.
    assert cells(text, "int8")[1:4] == ["~0.4", "~2.5", "~0.8"]
    assert cells(text, "int8")[6:8] == ["62 %", "**88 %**"]
    assert "seconds" not in text and "Not run" not in text


def test_absolute_times_are_for_gpus():
    gpu = MACHINE | {"type": "cuda"}
    rows = [row("merged", 0.5, batch=8, machine=gpu)]
    assert cells(table(rows, rows), "merged")[4:6] == ["0.500", "16.00"]


def test_no_ratio_between_machines():
    here, elsewhere = row("merged", 5.0), row("published", 10.0)
    elsewhere["machine"]["threads"] = 2
    assert ratio(here, elsewhere) is None and ratio(here, None) is None
    assert ratio(here, {"not_run": "needs a GPU", "machine": MACHINE}) is None
    text = table([here], [elsewhere])
    assert cells(text, "merged")[1:4] == ["", "", "1"]
    assert "No ratio to `published`, which was measured elsewhere: threads 2 there, 1 here." in text
    assert "it was not measured for these pictures" in table([here], [row("published", 9.0, size=256)])


def test_what_was_not_run_is_on_the_page_with_its_reason():
    absent = {"mode": "bf16", "size": 128, "batch": 1, "not_run": "needs a GPU", "machine": MACHINE}
    rows = [row("published", 2.0), absent, absent | {"mode": "fp16"}, absent | {"mode": "int8", "size": 256}]
    text = page({"a_cpu_full": rows})
    assert "## full on A CPU" in text and "### 128x128 to 512x512, 1 picture a call" in text
    assert "* Not run: `bf16`, `fp16`: needs a GPU." in text and "* Not run: `int8`: needs a GPU." in text


def test_the_embedded_model_stands_beside_the_full_one():
    results = {"a_cpu_embedded": [row("merged", 1.0)], "a_cpu_full": [row("published", 8.0)]}
    text = page(results)
    assert text.index("## full") < text.index("## embedded")
    assert cells(text, "merged")[1:4] == ["0.125", "8", "1"]


def test_another_dtype_has_tables_of_its_own():
    machine = MACHINE | {"dtype": "bf16"}
    results = {
        "a_cpu_embedded_bf16": [row("merged", 1.0) | {"machine": machine}],
        "a_cpu_full": [row("published", 9.0)],
        "a_cpu_full_bf16": [row("published", 4.0) | {"machine": machine}],
    }
    text = page(results)
    titles = re.findall(r"^## .* on A CPU$", text, re.MULTILINE)
    assert titles == ["## full on A CPU", "## full in bf16 on A CPU", "## embedded in bf16 on A CPU"]
    assert cells(text, "merged")[1:4] == ["0.25", "4", "1"]


def test_pictures_and_page_are_written(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from tsdsr.benchmarks.speed import write_results

    (tmp_path / "images").mkdir()
    rows = [row("published", 10.0), row("merged", 5.0), row("merged", 20.0, size=256)]
    write_results(tmp_path / "results" / "a_cpu_full.json", copy.deepcopy(rows))
    write_page(tmp_path / "results", tmp_path)
    picture = tmp_path / "images" / "benchmarks_a_cpu_full.svg"
    once = picture.read_text()
    assert "<svg" in once and (tmp_path / "benchmarks.md").read_text() == page({"a_cpu_full": rows})
    plot(rows, picture)
    assert picture.read_text() == once
    assert {path.name for path in tmp_path.iterdir()} == {"benchmarks.md", "images", "results"}
    with pytest.raises(SystemExit, match="There are no results"):
        write_page(tmp_path / "images", tmp_path)
