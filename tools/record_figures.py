"""Runs the recorded benchmarks, stamps them, and writes the tables of README.md and benchmarks/README.md from them.

    python3 tools/record_figures.py run [NAME...]  # on an idle machine, after the dev and release builds; all, or these
    python3 tools/record_figures.py tables    # tables again from benchmarks/results/*.json

No figure in those tables is typed by hand. `*_gpu.json`, `*_amx.json` and `sdpa_cpu.json`
come from other machines; benchmarks/README.md names their commands. Accuracy comes from `compact eval ruler` and `compact eval merge --json
benchmarks/results/demo_accuracy.json`, which take hours, so `run` leaves it alone.
"""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "demo.svg"
COMMANDS = {
    "attention_cpu": "build/dev/benchmarks/attention_cpu_bench --threads 2 --json {out}",
    "cost_model_cpu": "build/dev/benchmarks/cost_model_bench --threads 1 --cpu-time --repeats 8 --json {out}",
    "step_cpu": "build/release/compact bench step --context 2048,3072,4096,6144,8192,16384,32768 --threads 1 --cpu-time --json {out}",
    "demo_16k": "build/release/compact demo --json {out} --svg docs/images/demo.svg",
}


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def stamp(command: str) -> dict:
    cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return {"command": command, "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=10"),
            "date": datetime.date.today().isoformat(), "cpu": cpu.group(1) if cpu else "unknown",
            "cores": len(os.sched_getaffinity(0)), "compiler": output_of("g++", "--version").splitlines()[0],
            "load_before": os.getloadavg()[0]}


def run(names: list) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    for name in names or COMMANDS:
        command = COMMANDS[name]
        out = RESULTS / f"{name}.json"
        mark = stamp(command.format(out=out.relative_to(ROOT)))
        print(mark["command"], flush=True)
        subprocess.run(mark["command"].split(), cwd=ROOT, check=True)
        figures = json.loads(out.read_text())
        out.write_text(json.dumps({"stamp": mark, **figures}, indent=1, sort_keys=True) + "\n")


def load(name: str):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def made_by(figures: dict) -> str:
    mark = figures["stamp"]
    return f"`{mark['command']}`, {mark['cpu']}, {mark['cores']} cores, {mark['compiler']}, commit {mark['commit']}, {mark['date']}."


def demo_table(figures: dict) -> str:
    dense, compact = figures["dense"], figures["compact"]
    tick = lambda answer: f"`{answer.strip()}` {'✓' if figures['expected'].lower() in answer.lower() else '✗'}"
    ratio = lambda key: f"{dense[key] / compact[key]:.1f}x"
    return "\n".join([
        "![Which KV pages each KV head of each layer read](docs/images/demo.svg)", "",
        f"What it printed in the recorded run: {dense['prompt_tokens']:,} tokens, \"{figures['question']}\"", "",
        "| | dense | compact | |", "|---|---|---|---|",
        f"| answer (expected `{figures['expected']}`) | {tick(dense['answer'])} | {tick(compact['answer'])} | |",
        f"| time to first token | {dense['ttft_seconds']:.2f} s | {compact['ttft_seconds']:.2f} s | {ratio('ttft_seconds')} |",
        f"| attention (select, unite, attend) | {dense['attention_seconds']:.2f} s | {compact['attention_seconds']:.2f} s "
        f"| {ratio('attention_seconds')} |",
        f"| past KV pages read (density) | {dense['density']:.1%} | {compact['density']:.1%} | |",
        f"| union inflation | | {compact['union_inflation']:.2f} | |", "", made_by(figures)])


def accuracy_table(figures: dict, cpu: dict, torch: dict) -> str:
    """Accuracies with their samples on both backends; `torch`: dense answers of another implementation to the same prompts."""
    def of(rows: dict, key: tuple) -> str:
        row = rows.get(key)
        return f"{row['accuracy']:.1f} ({row['samples']})" if row else ""

    by_key = lambda rows: {(row["task"], row["tokens"]): row for row in rows}
    selected = lambda rows, name: by_key(row for row in rows["rows"] if row["selector"] == name)
    compact, dense = selected(figures, "mean-key"), selected(figures, "dense")
    cpu_compact, cpu_dense = selected(cpu, "mean-key"), selected(cpu, "dense")
    elsewhere = by_key(torch["rows"])
    lines = ["| task | tokens | compact | dense | compact, CPU | dense, CPU | dense, PyTorch | density | union inflation |",
             "|---|---|---|---|---|---|---|---|---|"]
    for key, row in compact.items():
        cells = [of(rows, key) for rows in (compact, dense, cpu_compact, cpu_dense, elsewhere)]
        lines.append(f"| {row['task']} | {row['tokens']:,} | {' | '.join(cells)} | {row['density']:.3f} | {row['union_inflation']:.2f} |")
    configuration = figures["configuration"]
    return "\n".join([*lines, "", f"Percent of the answers right (samples); compact: `mean-key` at its defaults. {configuration['form']} over held-out prose, "
                      f"greedy, final chunk {configuration['final_chunk']}, seed {configuration['seed']}. By the executable on the CUDA backend (bf16 cache, configuration "
                      f"{figures['digest']}) and on the CPU (fp32, {cpu['digest']}); density and inflation are those of the former. "
                      "PyTorch: the same prompts answered by `tools/demo_model/evaluate.py --prompts`, an implementation that shares no code with the engine."])


def task_accuracy_table(figures: dict) -> str:
    """Every task, dense beside compact, from one run."""
    dense = {(row["task"], row["tokens"]): row for row in figures["rows"] if row["selector"] == "dense"}
    lengths = sorted({row["tokens"] for row in figures["rows"]})
    tasks = {}
    for row in figures["rows"]:
        if row["selector"] != "dense":
            tasks.setdefault(row["task"], {})[row["tokens"]] = row
    lines = ["| task | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---|" + "---|" * len(lengths)]
    for task, rows in tasks.items():
        cells = [f"{dense[task, length]['accuracy']:.1f} / {rows[length]['accuracy']:.1f} ({rows[length]['density']:.3f})" for length in lengths]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    samples = sorted({row["samples"] for row in dense.values() if not row["task"].startswith("mean of")})
    return "\n".join([*lines, "", f"Percent right, dense / `mean-key` at its defaults (its density); {', '.join(map(str, samples))} samples a cell, CUDA backend, otherwise as above "
                      f"(configuration {figures['digest']})."])


def selector_label(selector: str) -> str:
    return selector.split(":")[0] + (", calibrated" if ":calibration=" in selector else "")


def compare_table(figures: list, images: str, least_density_only: bool = False) -> str:
    """Selectors at equal density: a block of lines for each length, the best first."""
    hardest = "niah_multikey_2"  # a text of nothing but keys and values: a page missed is an answer lost
    lines = ["| tokens | wanted | selector | RULER | " + hardest + " | density | inflation | recall | chosen / oracle | step ms | of it select | state B/token |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for one in figures:
        least = min(row["target"] for row in one["rows"] if row["target"])
        for row in sorted((row for row in one["rows"] if row["target"] <= least or not least_density_only), key=lambda row: (row["target"], -row["accuracy"], row["step_seconds"])):
            mass = "" if row["selector"].split(":")[0] in ("dense", "static") else f"{row['vs_oracle']:.2f}"
            lines.append(f"| {row['tokens']:,} | {row['target'] or ''} | {selector_label(row['selector'])} | {row['accuracy']:.0f} ({row['samples']}) | {row['tasks'][hardest]:.0f} | "
                         f"{row['density']:.3f} | {row['union_inflation']:.2f} | {row['recall']:.3f} | {mass} | {1e3 * row['step_seconds']:.2f} | "
                         f"{1e3 * row['select_seconds']:.2f} | {row['state_bytes_per_token']:.0f} |")
    tasks = {f"{one['rows'][0]['tokens']:,}": ", ".join(one["tasks"]) for one in figures}
    return "\n".join([*lines, "", "`assets/eval`. RULER: percent of answers right, mean of " + "; of ".join(f"{names} at {length}" for length, names in tasks.items()) +
                      " (samples). Density after the union, held equal by fitting each selector's one number on other prompts (`calibrated`: budgets per layer and head, nothing "
                      "fitted; at 65,536 tokens those of 32,768). Recall: attention mass that the lists read on the fitting prompts; chosen / oracle: mass of the chosen pages over that of "
                      "as many best ones. Step: select, unite and attend of a chunk and layer, one process alone on the GPU. All selectors by the same chunks, pages, forced pages and union.",
                      "", f"![Accuracy against the time of a step]({images}/compare_eval.svg)", "", *[elsewhere(one) + "\n" for one in figures]]).rstrip()


def compare_picture(figures: list) -> str:
    """Accuracy against the time of a step, a panel for each length: every point a selector at one density."""
    colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b"]
    width, height, left, top, gap = 300, 220, 50, 74, 46
    # Without the oracle, far to the right: exact masses cost more than dense attention.
    labels = list(dict.fromkeys(selector_label(row["selector"]) for one in figures for row in one["rows"] if row["target"] and row["selector"].split(":")[0] != "oracle"))
    color = {"dense": "#22303c"} | {label: colors[i % len(colors)] for i, label in enumerate(labels)}
    text = lambda x, y, size, what, anchor="start": f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{what}</text>'
    line = lambda x1, y1, x2, y2, stroke: f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'
    parts = [text(left, 24, 15, "Accuracy against the time of a step")]
    for i, label in enumerate(color):
        x, y = left + 125 * (i % 8), 42
        parts += [f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{color[label]}"/>', text(x + 14, y, 11, label)]
    for panel, one in enumerate(figures):
        x0 = left + panel * (width + gap)
        most = 1.08 * max(1e3 * row["step_seconds"] for row in one["rows"] if not row["selector"].startswith("oracle"))
        place = lambda row: (x0 + width * 1e3 * row["step_seconds"] / most, top + height * (1 - row["accuracy"] / 105))
        parts += [text(x0, top - 10, 12, f"{one['rows'][0]['tokens']:,} tokens"), text(x0 + width, top - 10, 11, "RULER, mean of tasks, %", "end"),
                  text(x0 + width / 2, top + height + 32, 11, "select, unite, attend; ms per chunk and layer", "middle"),
                  line(x0, top, x0, top + height, "#9aa5b1"), line(x0, top + height, x0 + width, top + height, "#9aa5b1")]
        for percent in (0, 25, 50, 75, 100):
            y = top + height * (1 - percent / 105)
            parts += [line(x0, y, x0 + width, y, "#eef1f4"), text(x0 - 6, y + 4, 10, percent, "end")]
        step = 0.05 if most < 0.3 else 0.1
        for tick in range(int(most / step) + 1):
            parts.append(text(x0 + width * tick * step / most, top + height + 15, 10, f"{tick * step:g}", "middle"))
        for label in color:
            points = sorted(place(row) for row in one["rows"] if selector_label(row["selector"]) == label)
            parts += [line(*a, *b, color[label]) for a, b in zip(points, points[1:])]
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{color[label]}"><title>{label}</title></circle>' for x, y in points]
    total = left + len(figures) * (width + gap)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{top + height + 44}" viewBox="0 0 {total} {top + height + 44}" font-family="sans-serif" fill="#22303c">\n'
            '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


def selector_seconds_table(figures: dict) -> str:
    lines = ["| selector | density | inflation | attention s of a prompt | to dense |", "|---|---|---|---|---|"]
    dense = next(row for row in figures["rows"] if row["selector"] == "dense")
    lines += [f"| {row['selector']} | {row['density']:.3f} | {row['union_inflation']:.2f} | {row['attention_seconds']:.2f} | "
              f"{dense['attention_seconds'] / row['attention_seconds']:.2f}x |" for row in figures["rows"]]
    return "\n".join([*lines, "", f"What that costs: selection, union and attention of the whole prefill of {dense['tokens']:,} tokens on two CPU cores, budgets fitted to density "
                      f"0.2 ({dense['samples']} prompts of {dense['task']}).", "", elsewhere(figures)])


def attention_table(figures: dict) -> str:
    sgemm = figures["sgemm"]
    lines = [f"Rates of this shared machine drift by 15 % and more within a run. sgemm of the same run: {max(row['gflops'] for row in sgemm):.0f} GFLOP/s, the largest median of three shapes.", "", "| shape | GFLOP/s, median | best | median / sgemm median |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['gflops']:.0f} | {row['gflops_best']:.0f} | {row['share_of_sgemm']:.0%} |" for row in figures["attention"]]
    return "\n".join([*lines, "", made_by(figures)])


def attention_avx2_table(figures: dict) -> str:
    lines = ["Kernels and OpenBLAS held to AVX2, one thread, per second of CPU time; sgemm of the same run, the largest median of three shapes.", "",
             "| shape | GFLOP/s, median | sgemm | share |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['gflops']:.0f} | {run['sgemm_gflops']:.0f} | {row['share_of_sgemm']:.0%} |"
              for run in figures["runs"] for row in run["attention"]]
    return "\n".join([*lines, "", elsewhere(figures)])


def step_table(figures: dict, source: str) -> str:
    lines = [f"One layer, D {figures['head_dim']}, Hq {figures['num_q_heads']}, Hkv {figures['num_kv_heads']}, C {figures['chunk']}, "
             f"{figures['dtype']}, kernel {figures['kernel']}, {figures['threads']} thread(s), {figures['clock']} time. Modes share the threshold at which "
             f"adaptive reads a density of {figures['wanted_density']:.2f} with the default forced pages. Of these contexts the default policy "
             f"gains from {figures['pays_from_tokens']:,} tokens on.", "",
             "| context | mode | select ms | unite ms | attend ms | against dense | density | union inflation |", "|---|---|---|---|---|---|---|---|"]
    for context in figures["contexts"]:
        for row in context["modes"]:
            lines.append(f"| {context['context']:,} | {row['name']} | {1e3 * row['select_seconds']:.1f} | {1e3 * row['unite_seconds']:.2f} | "
                         f"{1e3 * row['attend_seconds']:.1f} | {row['speedup']:.2f}x | {row['density']:.3f} | {row['union_inflation']:.2f} |")
    return "\n".join([*lines, "", source])


def cost_table(figures: dict) -> str:
    model = figures["cost_model"]
    return "\n".join([f"In 1/1024 of a tile step ({1e6 * figures['tile_seconds']:.0f} us of a thread: 128 rows x 128 keys, D {figures['head_dim']}, "
                      f"{figures['dtype']}, kernel {figures['kernel']}): per M-tile {model['m_tile']}, per 128 list tokens of a unit {model['list_tile']}, per "
                      f"unit {model['unit']}. Relative error over {len(figures['points'])} shapes: median {figures['median_relative_error']:.1%}, worst "
                      f"{figures['worst_relative_error']:.1%}.", "", made_by(figures)])


def gpu_layouts_table(figures: dict) -> str:
    shapes = {}
    for row in figures["rows"]:
        shapes.setdefault(row["shape"], {})[row["candidate"]] = row
    del shapes["GEMM 8192^3 bf16"]
    names = list(next(iter(shapes.values())))
    lines = [f"{figures['device']}, bf16, D 128, C 1024. Our kernel alone, the same problem in caches of different layout, in turns: sustained TFLOP/s and "
             f"time over that of {names[0]}. `P`: tokens of a page; pages in random order, or where they say so in logical order.", "",
             "| shape | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for shape, rows in shapes.items():
        cells = [f"{row['flop'] / row['sustained_ms'] * 1e-9:.0f} ({row['ratio_to_first']:.3f})" for row in rows.values()]
        lines.append(f"| {shape.removesuffix(' layouts')} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "`python3 benchmarks/attention_gpu_compare.py --library build/cuda/libcompact.so --only-ours --filter layouts --json "
                      f"benchmarks/results/attention_gpu_layouts.json`, commit {figures['commit']}, {figures['date']}."])


def attention_gpu_table(figures: dict, only: str = "") -> str:
    """`only`: shapes whose name contains this."""
    shapes = {}
    for row in figures["rows"]:
        shapes.setdefault(row["shape"], {})[row["candidate"]] = row
    gemm = shapes.pop("GEMM 8192^3 bf16")["cuBLAS"]
    rate = lambda row, key: row["flop"] / row[key] * 1e-9
    peers = list(dict.fromkeys(name for rows in shapes.values() for name in rows if name != "compact"))
    lines = [f"{figures['device']}, bf16, D 128, C 1024 and pages of 128 tokens in random order unless the shape says otherwise. In turns with its peers at "
             f"the clock that full load leaves (a bf16 GEMM of 8192^3: {rate(gemm, 'sustained_ms'):.0f} TFLOP/s sustained, "
             f"{rate(gemm, 'burst_ms'):.0f} in a burst). TFLOP/s count visible pairs. Peers: their time over ours, so above 1 ours is faster; "
             "cuDNN and FA2 compute the chunk's own pairs without a causal mask. `d`: density of the lists.", "",
             "| shape | ms | TFLOP/s | burst TFLOP/s | rel. error | " + " | ".join(f"{name} / ours" for name in peers) + " |",
             "|---|---|---|---|---|" + "---|" * len(peers)]
    for shape, rows in shapes.items():
        if only not in shape:
            continue
        ours = rows["compact"]
        ratios = [f"{rows[name]['ratio_to_first']:.2f}" if name in rows else "" for name in peers]
        lines.append(f"| {shape} | {ours['sustained_ms']:.4f} | {rate(ours, 'sustained_ms'):.0f} | {rate(ours, 'burst_ms'):.0f} | "
                     f"{ours['relative_error']:.4f} | " + " | ".join(ratios) + " |")
    return "\n".join([*lines, "", "`python3 benchmarks/attention_gpu_compare.py --library build/cuda/libcompact.so --json benchmarks/results/attention_gpu.json`"
                      " with `--peer` for FlashPrefill V2 (its commit 0f8e791, built apart), "
                      f"torch {figures['torch']}, cuDNN {figures['cudnn']}, commit {figures['commit']}, {figures['date']}."])


def elsewhere(figures: dict) -> str:
    mark = figures["stamp"]
    return f"`{mark['command']}`, {mark['machine']}, commit {mark['commit']}, {mark['date']}."


def step_gpu_table(figures: dict) -> str:
    lines = ["One layer and chunk, everything on the device and replayed from a CUDA graph: mean-key selection, union, page lists, attention. Stages are "
             "timed alone; the whole is less than their sum, since kernels overlap. Dense: our kernel. Adaptive with the crossover is the default policy.", "",
             "| shape | L | dense ms | paper: density | select + unite us | whole ms | to dense | default: density | inflation | whole ms | to dense |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for run in figures["runs"]:
        for context in run["contexts"]:
            rows = {row["name"]: row for row in context["modes"]}
            dense, paper, default = rows["dense"], rows["paper"], rows["default policy"]
            lines.append(f"| B{run['requests']} Hq{run['num_q_heads']} Hkv{run['num_kv_heads']} D{run['head_dim']} C{run['chunk']} | {context['context']:,} | "
                         f"{1e3 * dense['step_seconds']:.3f} | {paper['density']:.3f} | {1e6 * (paper['select_seconds'] + paper['unite_seconds']):.0f} | "
                         f"{1e3 * paper['step_seconds']:.3f} | {paper['speedup']:.2f}x | {default['density']:.3f} | {default['union_inflation']:.2f} | "
                         f"{1e3 * default['step_seconds']:.3f} | {default['speedup']:.2f}x |")
    lines += ["", "![Speed-up of a step over dense against the context](../docs/images/step_context.svg)"]
    return "\n".join([*lines, "", elsewhere(figures)])


def step_gpu_density_table(figures: dict) -> str:
    context = figures["contexts"][0]["context"]
    lines = [f"B{figures['requests']} Hq{figures['num_q_heads']} Hkv{figures['num_kv_heads']} C{figures['chunk']} L{context:,}: the time of a step is a line in what it reads. "
             "`adaptive` leaves the union of the whole chunk where that costs more than it saves.", "",
             "| wanted | paper: density | inflation | whole ms | to dense | adaptive: density | inflation | whole ms | to dense |", "|---|---|---|---|---|---|---|---|---|"]
    for point in figures["contexts"]:
        rows = {row["name"]: row for row in point["modes"]}
        lines.append(f"| {point['wanted_density']:.2f} | " + " | ".join(
            f"{row['density']:.3f} | {row['union_inflation']:.2f} | {1e3 * row['step_seconds']:.3f} | {row['speedup']:.2f}x" for row in (rows["paper"], rows["adaptive"])) + " |")
    lines += ["", "![Time of a step against what it reads](../docs/images/step_density.svg)"]
    return "\n".join([*lines, "", elsewhere(figures)])


def step_gpu_compare_table(figures: dict) -> str:
    """A line per shape and candidate; parts of a peer's step (no density of their own) after it."""
    shapes = {}
    for row in figures["rows"]:
        shapes.setdefault(row["shape"], []).append(row)
    lines = [f"{figures['device']}, bf16, D 128, pages of 128 tokens in random order. One layer and chunk, in turns at the clock that full load leaves: `compact` is "
             "selection, union and attention in one call at the default policy, `paper` unites whole chunks, `dense` reads all pages by the same call. FlashPrefill V2: its index "
             "and its block-sparse kernel, replayed from a CUDA graph so that its Python costs nothing, at the largest threshold that keeps 0.98 of the density of `compact`, no tiles forced "
             "dense, no mean correction. Its index takes the means of all pages anew at every call; `means kept`: without that. cuDNN computes the chunk's own pairs without a causal "
             "mask. Error: relative L2 against float32 over the pages that the candidate reads.", "",
             "| shape | candidate | ms | burst ms | density | rel. error | time / compact |", "|---|---|---|---|---|---|---|"]
    for shape, rows in shapes.items():
        for row in rows:
            density, error = ("", "") if row["density"] is None else (f"{row['density']:.3f}", f"{row['relative_error']:.4f}")
            lines.append(f"| {shape} | {row['candidate']} | {row['sustained_ms']:.3f} | {row['burst_ms']:.3f} | {density} | {error} | {row['ratio_to_first']:.2f} |")
    settings = {f"{row['shape']}: {row['settings']}" for row in figures["rows"] if row["settings"]}
    lines += ["", "Settings of FlashPrefill V2. " + ". ".join(sorted(settings)) + "."]
    return "\n".join([*lines, "", "`python3 benchmarks/step_gpu_compare.py --library build/cuda/libcompact.so --json benchmarks/results/step_gpu_compare.json` with `--peer` for "
                      f"FlashPrefill V2 (its commit 0f8e791, built apart), torch {figures['torch']}, cuDNN {figures['cudnn']}, commit {figures['commit']}, {figures['date']}."])


def select_gpu_table(figures: dict) -> str:
    lines = ["Selection (`mean-key`, default rule) and union of one layer and chunk, each timed alone with the stream held.", "",
             "| shape | mode | density | inflation | plan us | select us | unite us | select + unite us |", "|---|---|---|---|---|---|---|---|"]
    for run in figures["runs"]:
        for context in run["contexts"]:
            for row in context["modes"]:
                us = [1e6 * row[stage] for stage in ("plan_seconds", "select_seconds", "unite_seconds")]
                lines.append(f"| B{run['requests']} Hq{run['num_q_heads']} Hkv{run['num_kv_heads']} C{run['chunk']} L{context['context']} | {row['name']} | "
                             f"{row['density']:.3f} | {row['union_inflation']:.2f} | " + " | ".join(f"{x:.0f}" for x in us) + f" | {us[1] + us[2]:.0f} |")
    return "\n".join([*lines, "", elsewhere(figures)])


def append_gpu_table(figures: dict) -> str:
    lines = ["Keys rotated, K, V and page means written; queries turned in the same call. A copy moves as many bytes as K and V "
             "have (last column: as K, V and Q have), in the same run.", "",
             "| shape | copy ms | append K, V ms | of a copy | with Q ms | of a copy |", "|---|---|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['copy_ms']:.4f} | {row['kv_ms']:.4f} | {row['kv_to_copy']:.2f} | {row['all_ms']:.4f} | {row['all_to_copy']:.2f} |"
              for row in figures["rows"]]
    return "\n".join([*lines, "", elsewhere(figures)])


def prefill_gpu_table(figures: dict) -> str:
    shape = figures["shape"]
    experts = (f", {shape['experts_per_token']} of {shape['experts']} experts of {shape['expert_intermediate']} a token (routers of random weights "
               "spread tokens unevenly)") if "experts" in shape else ""
    requests = figures["rows"][0].get("requests", 1)
    lines = [f"Time to first token of the shape of {pathlib.Path(figures['model']).stem}: {shape['layers']} layers, hidden {shape['hidden']}, Hq {shape['q_heads']}, Hkv "
             f"{shape['kv_heads']}, D {shape['head_dim']}{experts}, bf16, weights drawn at random, {'one request' if requests == 1 else f'{requests} requests together'}. `random:share=0.1` forces a tenth of the past pages "
             "(plus sinks and windows; a second ratio adds the selection time of `mean-key` at the same length, since a draw costs nothing). `mean-key` is "
             "the default rule, which finds little on weights without meaning. A "
             f"product of 8192 x 8192 in the same run: {figures['gemm_tflops']:.0f} TFLOP/s; `of it`: FLOP of the whole dense model over TTFT against that.",
             "", "| L | C | selector | density | TTFT s | to dense | attention s | share | select s | of it | GB |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in figures["rows"]:
        if "error" in row:
            lines.append(f"| {row['context']:,} | | {row['selector']} | | no memory | | | | | | |")
            continue
        rate = f"{row['tflops'] / figures['gemm_tflops']:.0%}" if "tflops" in row else ""
        speedup = f"{row['speedup_to_dense']:.2f}x" if "speedup_to_dense" in row else ""
        chosen = [other for other in figures["rows"] if other["selector"].startswith("mean-key") and other["context"] == row["context"]
                  and other.get("chunk") == row["chunk"]]
        if speedup and chosen and row["selector"].startswith("random"):
            with_choice = row["ttft_seconds"] - row["select_seconds"] + chosen[0]["select_seconds"]
            speedup += f", {row['speedup_to_dense'] * row['ttft_seconds'] / with_choice:.2f}x"
        lines.append(f"| {row['context']:,} | {row['chunk']} | {row['selector'].split(':chunk')[0]} | {row['density']:.3f} | {row['ttft_seconds']:.2f} | {speedup} | "
                     f"{row['attention_seconds']:.2f} | {row['attention_share']:.0%} | {row['select_seconds']:.2f} | {rate} | {row['peak_bytes'] / 1e9:.0f} |")
    return "\n".join([*lines, "", elsewhere(figures)])


def sdpa_table(figures: dict) -> str:
    lines = [f"{figures['threads']} threads, in turns; of the same run: sgemm {figures['sgemm_gflops']:.0f}, PyTorch's bf16 matmul "
             f"{figures['bf16_matmul_gflops']:.0f} GFLOP/s. `kernel`: forced; without one asked for the fastest runs.", "",
             "| shape | ours, GFLOP/s | PyTorch SDPA | ours / PyTorch |", "|---|---|---|---|"]
    lines += [f"| {row['name']} | {row['gflops']:.0f} | {row['torch_gflops']:.0f} | {row['ratio']:.2f}x |" for row in figures["attention"]]
    return "\n".join([*lines, "", elsewhere(figures)])


def replace_block(path: pathlib.Path, name: str, text: str) -> None:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = path.read_text().split(begin)
    path.write_text(before + begin + "\n" + text + "\n" + end + rest.split(end)[1])


def tables() -> None:
    demo, attention, accuracy = load("demo_16k"), load("attention_cpu"), load("demo_accuracy")
    if demo:
        replace_block(ROOT / "README.md", "demo", demo_table(demo))
    recorded = []
    if accuracy:
        text = accuracy_table(accuracy, load("demo_accuracy_cpu"), load("demo_accuracy_torch"))
        replace_block(ROOT / "README.md", "accuracy", text)
        tasks = task_accuracy_table(load("demo_accuracy_tasks"))
        replace_block(ROOT / "assets" / "demo" / "README.md", "accuracy", f"{text}\n\n{tasks}")
        recorded += ["## Accuracy of the shipped checkpoint, `demo_accuracy.json`, `demo_accuracy_cpu.json`, `demo_accuracy_torch.json`", "", text, "",
                     "All tasks, `demo_accuracy_tasks.json`:", "", tasks, "",
                     "`compact eval ruler -m assets/demo --backend cuda --selector dense,mean-key` with the table's tasks, lengths and samples, in shards "
                     "(`--shard`), joined by `compact eval merge --json FILE`. Times in these files are of machines that did other work and stand in no "
                     "table.", ""]
    compare = [load(f"compare_eval_{length}") for length in ("8k", "32k", "64k")]
    if all(compare):
        (ROOT / "docs" / "images" / "compare_eval.svg").write_text(compare_picture(compare))
        replace_block(ROOT / "README.md", "selectors", compare_table(compare, "docs/images", least_density_only=True))
        recorded += ["## Selectors at equal density, `compare_eval_8k.json`, `compare_eval_32k.json`, `compare_eval_64k.json`", "",
                     compare_table(compare, "../docs/images"), ""]
    seconds = load("selectors_eval_8k_cpu")
    if seconds:
        recorded += ["## Selectors at equal density: time, `selectors_eval_8k_cpu.json`", "", selector_seconds_table(seconds), ""]
    attention_gpu = load("attention_gpu")
    if attention_gpu:
        replace_block(ROOT / "README.md", "gpu", attention_gpu_table(attention_gpu, only="L131072"))
        recorded += ["## Attention over page lists on one GPU, `attention_gpu.json`", "", attention_gpu_table(attention_gpu), ""]
    gpu_layouts = load("attention_gpu_layouts")
    if gpu_layouts:
        recorded += ["## Layouts of the cache on one GPU, `attention_gpu_layouts.json`", "", gpu_layouts_table(gpu_layouts), ""]
    step_gpu, sdpa = load("step_gpu"), load("sdpa_cpu")
    if step_gpu:
        recorded += ["## The step on one GPU, `step_gpu.json`", "", step_gpu_table(step_gpu), ""]
    step_gpu_compare = load("step_gpu_compare")
    if step_gpu_compare:
        of_readme = step_gpu_compare | {"rows": [row for row in step_gpu_compare["rows"] if "L131072" in row["shape"]]}
        replace_block(ROOT / "README.md", "step", step_gpu_compare_table(of_readme))
        recorded += ["## The step on one GPU beside peers, `step_gpu_compare.json`", "", step_gpu_compare_table(step_gpu_compare), ""]
    select_gpu, step_gpu_density = load("select_gpu"), load("step_gpu_density")
    if select_gpu:
        recorded += ["## Selection and union on one GPU, `select_gpu.json`", "", select_gpu_table(select_gpu), ""]
    if step_gpu_density:
        recorded += ["## The step on one GPU against density, `step_gpu_density.json`", "", step_gpu_density_table(step_gpu_density), ""]
    append_gpu, prefill_gpu = load("append_gpu"), load("prefill_gpu")
    if append_gpu:
        recorded += ["## The append on one GPU, `append_gpu.json`", "", append_gpu_table(append_gpu), ""]
    if prefill_gpu:
        replace_block(ROOT / "README.md", "prefill", prefill_gpu_table(prefill_gpu))
        recorded += ["## A whole model on one GPU, `prefill_gpu.json`, `prefill_gpu_qwen3.json`, `prefill_gpu_moe.json`, `prefill_gpu_moe_128k.json`, "
                     "`prefill_gpu_batch.json`", ""]
        for figures in map(load, ("prefill_gpu", "prefill_gpu_qwen3", "prefill_gpu_moe", "prefill_gpu_moe_128k", "prefill_gpu_batch")):
            recorded += [prefill_gpu_table(figures), ""] if figures else []
    if attention:
        recorded += ["## Attention on the CPU beside sgemm, `attention_cpu.json`", "", attention_table(attention), ""]
    avx2 = load("attention_cpu_avx2")
    if avx2:
        recorded += ["## Attention on the CPU without AVX-512, `attention_cpu_avx2.json`", "", attention_avx2_table(avx2), ""]
    if sdpa:
        recorded += ["## Attention on a CPU with AMX beside PyTorch, `sdpa_cpu.json`", "", sdpa_table(sdpa), ""]
    step, cost, step_amx = load("step_cpu"), load("cost_model_cpu"), load("step_cpu_amx")
    if step:
        recorded += ["## The whole step on the CPU, `step_cpu.json`", "", step_table(step, made_by(step)), ""]
    if step_amx:
        recorded += ["## The whole step on a CPU with AMX, `step_cpu_amx.json`", "", step_table(step_amx, elsewhere(step_amx)), ""]
    if cost:
        recorded += ["## Cost model of the CPU backend, `cost_model_cpu.json`", "", cost_table(cost), ""]
    if demo:
        recorded += ["## The demo, `demo_16k.json`", "", demo_table(demo).split("\n", 2)[2], ""]
    replace_block(ROOT / "benchmarks" / "README.md", "results", "\n".join(recorded).rstrip())


if __name__ == "__main__":
    actions = {"run": run, "tables": lambda names: tables()}
    if len(sys.argv) < 2 or sys.argv[1] not in actions or not set(sys.argv[2:]) <= set(COMMANDS):
        sys.exit(__doc__)
    actions[sys.argv[1]](sys.argv[2:])
