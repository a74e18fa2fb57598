"""The speed benchmark at a size that a test can afford: what it writes, never how long something took."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from tsdsr.benchmarks import speed
from tsdsr.benchmarks.report import page, table
from tsdsr.benchmarks.speed import MODES, Stages, count_flops, in_process, main, read_results, stored_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory from /proc")
QUICK = ["--quick", "--threads", "1", "--device", "cpu", "--dtype", "fp32"]


def test_operations_are_those_counted_by_hand():
    linear, conv = nn.Linear(5, 7).requires_grad_(False), nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    assert count_flops(lambda: linear(torch.rand(2, 5))) == 2 * 2 * 5 * 7
    assert count_flops(lambda: conv(torch.rand(1, 3, 8, 6))) == 2 * (8 * 6) * (3 * 9) * 4
    q, k = torch.rand(1, 2, 10, 64), torch.rand(1, 2, 12, 64)
    attention = torch.nn.functional.scaled_dot_product_attention
    # 2 heads; scores, then their product with the values.
    assert count_flops(lambda: attention(q, k, k)) == 2 * (2 * 2 * 10 * 12 * 64)
    a, b = (torch.ones(shape, dtype=torch.int8) for shape in ((32, 16), (16, 24)))
    assert count_flops(lambda: torch._int_mm(a, b)) == 2 * 32 * 16 * 24


def test_bytes_of_quantized_weights_are_those_stored():
    assert stored_bytes(torch.zeros(3, 4, dtype=torch.float16)) == 24
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    assert 64 * 64 < stored_bytes(layer[0].weight) <= 64 * 64 + 64 * 4 * 2


def test_stages_add_up_to_the_call():
    watch = Stages(torch.device("cpu"), begun=1.0)
    # Two photographs; the second one's first stage begins where the first one's last one ended.
    watch.moments = [("encode", 2.0), ("step", 4.0), ("step", 5.0), ("decode", 9.0), ("encode", 10.0), ("decode", 12.0)]
    assert watch.seconds(12.5) == {"encode": 2.0, "step": 3.0, "decode": 6.0, "rest": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


@linux
def test_quick_rows(folder):
    modes = ["published", "merged", "tile_batches", "cuda_graphs"]
    main([*QUICK, "--folder", str(folder), "--modes", *modes, "--sizes", "16", "--batches", "1", "2"])
    main([*QUICK, "--folder", str(folder), "--modes", "merged", "tile_batches", "--sizes", "136", "--batches", "1"])
    (file,) = (folder / "quick_results").glob("*.json")
    rows = {(row["mode"], row["size"], row["batch"]): row for row in read_results(file)}
    assert len(rows) == 2 * len(modes) + 2
    assert rows["tile_batches", 16, 1]["not_run"] == "the transformer takes the picture as one tile"
    assert rows["cuda_graphs", 16, 2]["not_run"] == "needs a GPU"
    measured = {key: row for key, row in rows.items() if "seconds" in row}
    assert set(measured) == {
        *((mode, 16, batch) for mode in ("published", "merged") for batch in (1, 2)),
        *((mode, 136, 1) for mode in ("merged", "tile_batches")),
    }
    for row in measured.values():
        numbers = [value for value in (*row.values(), *row["stages"].values()) if isinstance(value, float)]
        assert len(numbers) >= 8 and all(math.isfinite(number) and number >= 0 for number in numbers)
        # The median of one call's parts are its parts.
        assert row["repeats"] == 1 and sum(row["stages"].values()) == pytest.approx(row["seconds"])
        assert row["machine"]["threads"] == 1 and row["machine"]["torch"] == torch.__version__
    for mode in ("published", "merged"):
        assert rows[mode, 16, 2]["flops"] == 2 * rows[mode, 16, 1]["flops"]
        assert rows[mode, 16, 2]["weight_bytes"] == 2 * rows[mode, 16, 1]["weight_bytes"]
    # LoRAs beside the weights are more work, and more to read.
    assert rows["published", 16, 1]["flops"] > 1.02 * rows["merged", 16, 1]["flops"]
    assert rows["published", 16, 1]["weights_gb"] > rows["merged", 16, 1]["weights_gb"]
    # Four tiles: the same work in fewer calls.
    assert rows["merged", 136, 1]["flops"] == rows["tile_batches", 136, 1]["flops"]
    assert rows["merged", 136, 1]["weight_bytes"] > rows["tile_batches", 136, 1]["weight_bytes"]
    assert table([rows["merged", 136, 1]], []).count("| `merged` |") == 1


@linux
def test_a_row_in_a_process_of_its_own_is_kept_until_it_is_to_be_redone(folder, tmp_path, capsys):
    model = folder / "quick_networks"
    if not model.exists():
        speed.make_weights(model, speed.QUICK_TRANSFORMER, speed.QUICK_VAE)
    command = f"--model {model} --modes merged --sizes 16 --batches 1 --repeats 1 --threads 1 --side 64".split()
    command += ["--folder", str(tmp_path), "--results", str(tmp_path / "results"), "--device", "cpu"]
    main([*command, "--max-minutes", "0"])
    (file,) = (tmp_path / "results").iterdir()
    assert file.name.endswith("_quick_networks.json")
    assert read_results(file)[0]["not_run"] == "no time was left (--max-minutes 0)"
    main(command)
    first = read_results(file)
    assert first[0]["seconds"] > 0 and first[0]["peak_gb"] > 0 and "not_run" not in first[0]
    capsys.readouterr()
    main(command)
    assert "kept" in capsys.readouterr().err and read_results(file) == first
    # Beside what was measured, and only there.
    main([*command, "--profile", "--modes", "merged", "fused_qkv"])
    (profiled,) = read_results(file)
    shares = profiled.pop("operators")
    assert [profiled] == first and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert min(shares[kind] for kind in ("convolution", "matrix product", "attention", "normalisation")) > 0
    assert "Time by kind of operator" in page({"quick": read_results(file)})
    first = read_results(file)
    # What cannot be done again does not take the place of what was measured.
    main([*command, "--redo", "--max-minutes", "0"])
    assert read_results(file) == first


def test_why_a_process_gave_no_row():
    def python(code):
        return in_process([sys.executable, "-c", code], 20)

    assert python("print('noise'); print('{\"seconds\": 1}')") == {"seconds": 1}
    assert python("raise MemoryError") == {"not_run": "out of memory"}
    torch_says = "raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 1 bytes.')"
    assert python(torch_says) == {"not_run": "out of memory"}
    assert python("import os; os.kill(os.getpid(), 9)") == {"not_run": "out of memory"}
    assert python("raise ValueError('no such thing')") == {"not_run": "failed: ValueError: no such thing"}
    assert "not done after" in in_process([sys.executable, "-c", "import time; time.sleep(30)"], 0)["not_run"]


def test_modes_say_what_they_are_and_where_they_cannot_be(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderTiny"]}))
    setting = speed.Setting(tmp_path, tmp_path, 128, 1, torch.float32, torch.device("cpu"))
    absent = {name for name, mode in MODES.items() if mode.absent(setting)}
    assert {"published", "tile_batches", "cuda_graphs", "autotuned", "fp8_dynamic", "fp16"} <= absent
    assert not absent & {"merged", "channels_last", "fused_qkv", "compiled"}
    assert len({mode.what for mode in MODES.values()}) == len(MODES)


@pytest.mark.parametrize("supported", [False, True])
def test_bfloat16_where_a_cpu_computes_in_it_and_not_all_modes_do(tmp_path, monkeypatch, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    device = torch.device("cpu")
    for name in ("bf16", "baked_bf16"):
        reason = MODES[name].absent(speed.Setting(tmp_path, tmp_path, 128, 1, torch.float32, device))
        assert reason == (None if supported else "this CPU does not compute in bfloat16")
        reason = MODES[name].absent(speed.Setting(tmp_path, tmp_path, 128, 1, torch.bfloat16, device))
        assert reason == "all modes compute in it here"


def test_a_folder_that_holds_no_pipeline(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--folder", str(tmp_path)])
    assert f"{tmp_path} is not a pipeline folder" in capsys.readouterr().err
