"""A report shows what was measured, all of it and nothing else, and never breaks the page."""

import csv
import io
import json
import math
import re
from itertools import pairwise

import pytest
from strict_page import StrictPage

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.evaluation.statistics import wilson_interval
from megatron_longrope.frequencies import named_factors
from megatron_longrope.report.report import (
    find_factor_sets,
    find_search_traces,
    load_results,
    summary_sentence,
    summary_table,
    write_report,
)
from megatron_longrope.report.results import check_results
from megatron_longrope.report.search_figures import draw_search, draw_start_tokens
from megatron_longrope.report.search_trace import (
    SearchTrace,
    StartTokenCurve,
)
from megatron_longrope.report.style import METHODS, NEUTRALS, spread_labels, style_of
from megatron_longrope.search.journal import Evaluation, read_records

RESULTS = {
    "original_length": 256,
    "perplexity": {
        "longrope_search": {"256": 31.6, "512": 31.5, "2048": 36.8},
        "none": {"256": 31.2, "512": 88.0, "2048": 1310.0},
        "ntk": {"256": 32.1, "512": 33.9},
    },
    "attention_factor_policy": {"ntk": {"512": "su"}},
    "passkey": {"256": 1.0, "2048": 0.65},
    "passkey_trials": 20,
    "conversion": {"max_abs_logit_diff_short": 3.1e-6, "dtype": "float32"},
    "cp_parity": {"cp1_loss": 3.402312, "cp2_loss": 3.402318},
    "seconds": {"search": 311.0, "convert": 9.9},
    "versions": {"torch": "2.9.0"},
    "seed": 1234,
}
GEOMETRY = (16, 8.0, 10000.0, 256)  # rotary_dim, extension ratio, base, original window
FACTORS = (1.0, 1.1, 1.5, 2.5, 4.5, 8.0, 8.0, 9.0)
STEMS = ("perplexity", "rescale_factors", "search_progress", "passkey")


def save_results(directory, results=RESULTS):
    directory.mkdir(exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results))
    return directory


def save_config(path, factors=FACTORS):
    sets = (FactorSet(256, (1.0,) * 8), FactorSet(2048, factors, 4))
    LongRopeConfig(10000.0, 16, 256, sets).save(path)


def save_journal(path, scores=(61.0, 71.2, 42.9, 40.0, math.inf, 38.5), extra=()):
    """A journal of the first version, which knew no index and no stopping."""
    seeds = [named_factors(name, *GEOMETRY) for name in ("pi", "ntk", "yarn")]
    lines = [{"journal": 1, "settings": {"seed": 1}, "settings_sha256": ""}]
    for index, score in enumerate(scores):
        values = seeds[index] if index < 3 else FACTORS
        lines.append({
            "rescale_factors": [round(value, 2) for value in values], "num_start_tokens": 0,
            "score": score if math.isfinite(score) else None, "sample_nlls": [], "seconds": 0.5,
            "error": None if math.isfinite(score) else "out of memory",
        })  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *extra]))


def entry(index, score, start_tokens=0, nlls=(), stopped=None):
    """A line of a later version's journal."""
    return {
        "index": index, "rescale_factors": list(FACTORS), "num_start_tokens": start_tokens,
        "score": score, "sample_nlls": list(nlls), "seconds": 0.5, "stopped": stopped,
        "error": None,
    }  # fmt: skip


def trace_of(name, scores, seeds):
    return SearchTrace(
        name, [Evaluation(FACTORS, 0, score, index=i) for i, score in enumerate(scores)], {}, seeds
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with everything, and its report."""
    directory = save_results(tmp_path_factory.mktemp("runs") / "tiny & <fast>")
    (directory / "search").mkdir()
    save_config(directory / "search" / "search_8x.json")
    save_journal(directory / "search" / "search_8x.journal.jsonl")
    (directory / "config.json").write_text('{"schema": 1, "other": true}')
    (directory / "tokenizer.json").write_text("not JSON")
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def text(run):
    return (run / "report.html").read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def refusal(value) -> str:
    with pytest.raises(ValueError) as caught:
        check_results(value)
    return str(caught.value)


def test_the_page_is_well_formed_and_needs_no_other_file(text):
    page = StrictPage(text)
    files = {f"figures/{stem}.{kind}" for stem in STEMS for kind in ("png", "csv")}
    assert {link for link in page.links if not link.startswith("#")} == files
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", text)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= page.ids


def test_the_page_holds_every_fact(text):
    shown = " ".join("".join(StrictPage(text).text).split())
    for fact in ("tiny & <fast>", "256 tokens", "<b>", "31.20", "1,310", "3.10e-06", "float32",
                 "3.40231", "6.00e-06", "5 min 11 s", "9.9 s", "2.9.0", "1234",
                 "search/search_8x.json", "1 to 9", "20 trials"):  # fmt: skip
        assert fact in shown or fact in text, fact


def test_the_lowest_of_each_length_is_bold_and_gaps_are_dashes(text):
    table = text[text.index("<table") : text.index("</table>")]
    assert re.findall(r"<b>(.*?)</b>", table) == ["31.20", "31.50", "36.80"]
    assert table.count("\N{EN DASH}") == 1
    assert "33.90<small>su</small>" in table


def test_neutral_colours_follow_the_theme(text):
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    colours = {value.upper() for value in re.findall(r"#[0-9a-fA-F]{6}\b", svg)}
    methods = {style.color.upper() for style in METHODS.values()}
    assert colours <= methods | {color.upper() for color in NEUTRALS}
    dark = text[text.index("@media screen and (prefers-color-scheme: dark)") :]
    for color, variable in NEUTRALS.items():
        assert f"stroke: {color}" in svg
        assert f'svg [style*="stroke: {color}"] {{ stroke: var({variable}) !important; }}' in dark
        assert f"{variable}: #" in dark
    assert "@media print" in text


def test_every_figure_has_a_png_and_its_data(run):
    names = {path.name for path in (run / "figures").iterdir()}
    assert names == {f"{stem}.{kind}" for stem in STEMS for kind in ("png", "csv")}
    for stem in STEMS:
        assert (run / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of((run / "figures" / "perplexity.csv").read_text())[:3] == [
        ["method", "length", "perplexity"],
        ["none", "256", "31.2"],
        ["none", "512", "88.0"],
    ]
    factors = rows_of((run / "figures" / "rescale_factors.csv").read_text())
    assert [float(row[4]) for row in factors if row[2] == "longrope"] == list(FACTORS)
    assert [float(row[4]) for row in factors if row[2] == "pi"] == [8.0] * 8
    progress = rows_of((run / "figures" / "search_progress.csv").read_text())
    assert [row[3] for row in progress[1:]] == ["61.0", "61.0", "42.9", "40.0", "40.0", "38.5"]
    assert progress[5][2] == ""  # a failed evaluation has no score


def test_the_same_input_gives_the_same_bytes(run, text):
    before = {path: path.read_bytes() for path in (run / "figures").iterdir()}
    write_report(run)
    assert (run / "report.html").read_text(encoding="utf-8") == text
    assert {path: path.read_bytes() for path in (run / "figures").iterdir()} == before


def test_what_was_not_measured_is_left_out(tmp_path):
    page = write_report(save_results(tmp_path / "run", {}))
    text = page.read_text(encoding="utf-8")
    StrictPage(text)
    assert "No perplexity was measured." in text
    assert "<h2" not in text and "<table" not in text
    assert not (page.parent / "figures").exists()


def test_one_value_is_enough_for_a_report(tmp_path):
    results = {"perplexity": {"pi": {"512": 7.0}}, "passkey": {"512": 0}, "original_length": 4096}
    text = write_report(save_results(tmp_path / "run", results)).read_text(encoding="utf-8")
    assert "At 512 tokens, within the original window, PI has a perplexity of 7.00." in text
    assert "<b>7.00</b>" not in text  # best of one says nothing


def test_text_from_the_results_cannot_break_the_page(tmp_path):
    evil = "<script>&\"'$x_1$"
    results = {
        "perplexity": {evil: {"256": 3.0}, "pi": {"256": 4.0}},
        "attention_factor_policy": {evil: {"256": evil}},
        "conversion": {evil: evil, "nested": {evil: [evil]}},
        "versions": {evil: evil},
        "seconds": {evil: 1},
        "seed": evil,
    }
    text = write_report(save_results(tmp_path / "run", results)).read_text(encoding="utf-8")
    StrictPage(text)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 9


def test_the_output_can_lie_elsewhere(tmp_path):
    directory = save_results(tmp_path / "run")
    page = write_report(directory, tmp_path / "site" / "index.html")
    assert page == tmp_path / "site" / "index.html" and page.is_file()
    assert (tmp_path / "site" / "figures" / "passkey.png").is_file()
    assert [path.name for path in directory.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="is a directory"):
        write_report(directory, tmp_path)


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no results\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"no directory to report on"):
        write_report([])
    (tmp_path / "results.json").write_text('{"perplexity": ')
    with pytest.raises(ValueError, match=r"results\.json: .*truncated"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text('{"perplexity": {"pi": {"256": NaN}}}')
    with pytest.raises(ValueError, match=r"results\.json: perplexity\.pi\.256 is nan"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "results must be a JSON object, got list"),
        ({"perplexity": [1]}, "perplexity must be a JSON object"),
        ({"perplexity": {"pi": 3.0}}, "perplexity.pi must be a JSON object"),
        ({"perplexity": {"pi": {"4k": 3.0}}}, "perplexity.pi has the key '4k'"),
        ({"perplexity": {"pi": {"0": 3.0}}}, "perplexity.pi has the key '0'"),
        ({"perplexity": {"pi": {"256": "3"}}}, "perplexity.pi.256 is '3'"),
        ({"perplexity": {"pi": {"256": True}}}, "perplexity.pi.256 is True"),
        ({"perplexity": {"pi": {"256": 0}}}, "must be a finite number above 0"),
        ({"perplexity": {"pi": {"256": math.inf}}}, "perplexity.pi.256 is inf"),
        ({"passkey": {"256": 1.5}}, "passkey.256 is 1.5; it must be a finite number of at least 0"),
        ({"passkey_trials": 0}, "passkey_trials is 0; it must be a positive integer"),
        ({"original_length": "256"}, "original_length is '256'"),
        ({"attention_factor_policy": {"pi": "su"}}, "attention_factor_policy.pi must be"),
        ({"seconds": {"search": "long"}}, "seconds.search is 'long'"),
        ({"cp_parity": {"cp1_loss": "3"}}, "cp_parity.cp1_loss is '3'"),
        ({"versions": "2.9"}, "versions must be a JSON object"),
    ],
)
def test_malformed_results_are_refused_by_name_value_and_rule(results, message):
    assert message in refusal(results)


def test_null_is_the_same_as_absent():
    results = check_results({"perplexity": {"pi": {"512": 3.0, "256": None}}, "passkey": None})
    assert results["perplexity"] == {"pi": {512: 3.0}} and results["passkey"] == {}


def test_the_plain_table_lists_methods_in_order_and_stars_the_lowest():
    assert summary_table(RESULTS).splitlines() == [
        "Perplexity                256     512      2k",
        "-" * 46,
        "No extension            31.20*  88.00   1,310",
        "NTK                     32.10   33.90       \N{EN DASH}",
        "LongRoPE (search only)  31.60   31.50*  36.80*",
        "* lowest of its column",
        "attention factor of the better value: NTK su",
    ]
    assert summary_table({}) == "No perplexity was measured."


def test_the_sentence_compares_at_the_longest_length_that_all_methods_share():
    assert summary_sentence(check_results(RESULTS)) == (
        "At 512 tokens, 2 times the original window, LongRoPE (search only) has the lowest "
        "perplexity of the 3 methods measured there, 31.50; next is NTK with 33.90."
    )
    apart = {"pi": {"256": 2.0}, "ntk": {"512": 3.0, "256": 2.0}, "yarn": {"1024": 4.0}}
    assert summary_sentence(check_results({"perplexity": apart})) == (
        "At 256 tokens PI and NTK share the lowest perplexity of the 2 methods measured there, "
        "2.00."
    )


def test_factor_sets_are_found_once_and_broken_files_are_named(tmp_path):
    save_config(tmp_path / "b.json")
    (tmp_path / "deep").mkdir()
    save_config(tmp_path / "deep" / "copy.json")
    save_config(tmp_path / "deep" / "other.json", (*FACTORS[:-1], 10.0))
    broken = json.loads((tmp_path / "b.json").read_text())
    broken["factor_sets"][1]["rescale_factors"][0] = -1.0
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    (tmp_path / "list.json").write_text("[1]")
    sets, notes = find_factor_sets(tmp_path)
    assert [(name, item.max_length) for name, _, item in sets] == [
        ("b.json", 2048),
        ("deep/other.json", 2048),
    ]
    assert len(notes) == 1 and notes[0].startswith("broken.json was left out: factor_sets[1]")


def test_seeds_are_recognised_and_damaged_lines_passed_over(tmp_path):
    path = tmp_path / "first.journal.jsonl"
    save_config(tmp_path / "first.json")
    save_journal(path)
    with path.open("a") as file:
        file.write('[]\n{"score": "x", "rescale_factors": [1]}\n{"score": 3, "resc')
    (tmp_path / "empty.journal.jsonl").write_text("")
    configs = [config for _, config, _ in find_factor_sets(tmp_path)[0]]
    (trace,) = find_search_traces(tmp_path, configs)
    assert trace.name == "first"
    scores = [record.score for record in trace.records]
    assert scores == [61.0, 71.2, 42.9, 40.0, math.inf, 38.5]
    assert trace.seeds == {"pi": 61.0, "ntk": 71.2, "yarn": 42.9}
    assert find_search_traces(tmp_path)[0].seeds == {}


@pytest.mark.parametrize("scores", [(5.0,), (math.inf, 4.0), (9e9, 3.0, math.inf, 2.0)])
def test_a_short_or_wild_search_can_be_drawn(scores):
    assert draw_search([trace_of("x", scores, {})]).png.startswith(b"\x89PNG")


def test_candidates_stopped_early_are_shown_and_never_the_best(tmp_path):
    save_config(tmp_path / "first.json")
    later = [
        entry(8, 37.0, 2, (3.5, 3.7)),
        entry(7, 12.0, 4, (2.0,), "budget"),
        entry(6, None, 8, (9.0,), "exact"),
    ]
    save_journal(tmp_path / "first.journal.jsonl", extra=later)
    results = save_results(tmp_path, {"perplexity": {"pi": {"512": 7.0}}})
    shown = write_report(results).read_text(encoding="utf-8")
    progress = rows_of((tmp_path / "figures" / "search_progress.csv").read_text())[1:]
    assert [row[3] for row in progress[5:]] == ["38.5", "38.5", "38.5", "37.0"]
    assert [row[4] for row in progress[5:]] == ["", "exact", "budget", ""]
    assert [row[6] for row in progress[5:]] == ["0", "1", "2", "4"]
    curve = rows_of((tmp_path / "figures" / "start_tokens.csv").read_text())[1:]
    assert [(row[1], row[3]) for row in curve] == [("2", "1"), ("4", "1"), ("8", "1")]
    assert "Perplexity by start tokens" in shown and "over 1 sample." in shown
    StrictPage(shown)


def test_a_search_without_a_complete_candidate_has_no_trace(tmp_path):
    save_journal(tmp_path / "x.journal.jsonl", (), [entry(0, 5.0, stopped="budget")])
    assert len(read_records(tmp_path / "x.journal.jsonl")) == 1
    assert find_search_traces(tmp_path) == []


@pytest.mark.parametrize(
    "points", [{0: 3.0, 1: 3.0}, {4: 2.0, 256: 9e5}, {0: 1.0, 20: 1.1, 24: 1.2, 28: 1.3, 32: 1.0}]
)
def test_flat_wild_and_crowded_start_token_curves_can_be_drawn(points):
    drawing = draw_start_tokens([StartTokenCurve("x", FACTORS, "yarn", 5, points)])
    assert drawing.png.startswith(b"\x89PNG") and "over 5 samples" in drawing.caption


def test_of_many_unpublished_starting_points_only_the_best_has_a_line():
    seeds = {f"cd{index}": 39.0 - index for index in range(30)} | {"near-pi": 8.0}
    svg = [draw_search([trace_of("x", (5.0, 4.0), some)]).svg
           for some in (seeds, {"cd29": 10.0, "near-pi": 8.0})]  # fmt: skip
    assert svg[0] == svg[1]
    assert style_of("near-pi") == METHODS["pi"]._replace(label="near PI")


def test_labels_move_apart_as_little_as_possible():
    assert spread_labels([0.2, 0.9, 0.5], 0.1) == [0.2, 0.9, 0.5]
    assert spread_labels([0.52, 0.5], 0.1) == pytest.approx([0.56, 0.46])
    assert spread_labels([1.0, 1.0, 0.0], 0.1) == pytest.approx([0.9, 1.0, 0.0])
    places = spread_labels([0.5, 0.5, 0.59, 0.7, 0.31], 0.1)
    ordered = sorted(places)
    assert all(b - a > 0.0999 for a, b in pairwise(ordered))


def test_the_wilson_interval_matches_published_values():
    # 10 of 10 and 0 of 10: 1 / (1 + z^2 / 10) and its mirror image.
    assert wilson_interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(0.5, 100) == pytest.approx((0.403832, 0.596168), abs=1e-6)


def test_results_are_normalised_once_and_for_all(run):
    results = load_results(run)
    assert list(results["perplexity"]) == ["none", "ntk", "longrope_search"]
    assert check_results(results) == results


def test_the_command_prints_the_table_and_the_page(tmp_path, capsys):
    directory = save_results(tmp_path / "run")
    assert main(["report", str(directory)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(summary_table(RESULTS)) and "report.html" in printed
    assert main(["report", str(tmp_path)]) == 1
    assert "has no results.json" in capsys.readouterr().err


def test_the_table_says_which_attention_factor_gave_a_methods_better_value():
    results = {
        "perplexity": {"ntk": {"512": 3.0, "1024": 4.0}, "yarn": {"512": 2.0, "1024": 3.0}},
        "attention_factor_policy": {
            "ntk": {"512": "none", "1024": "su"},
            "yarn": {"512": "su", "1024": "su"},
        },
    }
    last = summary_table(results).splitlines()[-1]
    assert last == "attention factor of the better value: NTK none (512), su (1k); YaRN su"


def test_a_search_whose_candidates_all_fit_the_frame_is_laid_out_without_a_warning(recwarn):
    draw_search([trace_of(str(i), [3.0, 2.9, 2.8], {"pi": 3.0}) for i in range(5)])
    points = {0: 3.0, 1: 2.9, 2: 2.8, 256: 90.0}
    draw_start_tokens([StartTokenCurve("x", FACTORS, None, 1, points)] * 5)
    assert not [item for item in recwarn if "layout" in str(item.message)]
