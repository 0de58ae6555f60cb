"""The comparison page shows every model side by side, with what is needed to judge the numbers."""

import csv
import json
import math
import re

import pytest
from evaluated import everything, needle, passkey, ppl, save, short, whose
from strict_page import StrictPage

from megatron_longrope.cli import main
from megatron_longrope.config import FactorSet, LongRopeConfig
from megatron_longrope.report.page import write_report
from megatron_longrope.report.style import LOOKS, NEUTRALS

LENGTHS, DEPTHS = (4096, 16384), (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two models with everything measured, and their report."""
    directory = everything(
        tmp_path_factory.mktemp("runs") / "eval & <co>", ("base", "longer"), LENGTHS, DEPTHS, 2
    )
    config = LongRopeConfig(1e4, 16, 4096, (FactorSet(16384, (1.0,) * 4 + (4.0,) * 4),))
    config.save(directory / "longer" / "factors.json")
    write_report(directory)
    return directory


@pytest.fixture(scope="module")
def text(run):
    return (run / "report.html").read_text(encoding="utf-8")


def page_of(directory, *more):
    page, _ = write_report([directory, *more], directory / "page.html")
    return page.read_text(encoding="utf-8")


def table_after(text, heading):
    start = text.index("<table", text.index(heading))
    return text[start : text.index("</table>", start)]


def bold_in(table):
    return re.findall(r"<b>(.*?)</b>", table)


def data_of(directory, name):
    with (directory / "figures" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_page_is_well_formed_and_needs_no_other_file(run, text):
    page = StrictPage(text)
    files = {f"{d}/{path.name}" for d in ("figures", "tables") for path in (run / d).iterdir()}
    files.discard("tables/series.csv")
    assert {link for link in page.links if not link.startswith("#")} == files
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)", text)
    labels = set(re.findall(r'<svg[^>]*aria-labelledby="([^"]*)"', text))
    assert len(labels) == len([*(run / "figures").glob("*.csv")]) and labels <= page.ids


def test_every_kind_has_a_section_and_the_figures_their_data(run, text):
    headings = re.findall(r"<h[23][^>]*>(.*?)</h[23]>", text)
    assert headings == [
        "Perplexity by sequence length (truncated)", "Loss by position in a window of 16k",
        "Perplexity by sequence length (sliding, stride 256)",
        "Loss by position in a window of 16k", "Passkey retrieval, teacher-forced",
        "Passkey retrieval, teacher-forced, by depth", "Needle retrieval, single",
        "Needle perplexity, single", "Needle retrieval, single, by depth",
        "Needle retrieval, multi query", "Needle perplexity, multi query",
        "Needle retrieval, multi query, by depth", "Short benchmarks",
        "Rescale factors by dimension",
        "Measured how", "Data, seeds and versions",
    ]  # fmt: skip
    rows = data_of(run, "perplexity")
    assert {(row["model"], row["label"], row["length"]) for row in rows} == {
        (model, "checkpoint", str(n)) for model in ("base", "longer") for n in LENGTHS
    }
    assert len(data_of(run, "passkey_by_depth")) == 2 * len(LENGTHS) * len(DEPTHS)
    assert {row["from"] for row in data_of(run, "perplexity_by_position")} == {
        str(i * 16383 // 8) for i in range(8)
    }


def test_the_page_says_how_everything_was_measured(text):
    shown = " ".join("".join(StrictPage(text).text).split())
    sha256 = whose()["config_sha256"]
    assert sha256[:12] in shown and sha256 not in shown
    for fact in ("ckpt/base", "ckpt/longer", "1000", "proof.jsonl:10", "42", "0.4.13", "10-shot",
                 "the paper's number", "original window 4,096 tokens", "0.4.13", "4,096",
                 "ppl.jsonl, passkey.jsonl, needle.jsonl, short.jsonl"):  # fmt: skip
        assert fact in shown, fact


def test_both_means_are_shown_and_the_lowest_is_bold(tmp_path):
    rows = [ppl(4096, 3.0) | whose("a"), ppl(4096, 4.0) | whose("b"), ppl(8192, 5.0) | whose("b")]
    save(tmp_path, "ppl", rows)
    table = table_after(page_of(tmp_path), "Perplexity by sequence length")
    assert bold_in(table) == ["3.00"] and "<b>3.00</b><small>3.03</small>" in table
    assert table.count("\N{EN DASH}") == 1


def test_values_on_other_tokens_are_warned_of_and_none_is_called_the_best(tmp_path):
    rows = [ppl(n, 3.0 + i, tokens=m if n == 8192 else "t") | whose(m)
            for n in (4096, 8192) for i, m in enumerate("ab")]  # fmt: skip
    save(tmp_path, "ppl", rows)
    text = page_of(tmp_path)
    assert 'class="warning">Not all rows were measured on the same tokens at 8k' in text
    assert bold_in(table_after(text, "Perplexity by sequence length")) == ["3.00"]
    assert write_report(tmp_path)[1].count("3.00*") == 1


def test_infinite_and_undefined_perplexities_are_shown_and_not_drawn(tmp_path):
    rows = [ppl(4096, 3.0), ppl(8192, 4.0, ppl_window_mean=math.inf, nll_by_position=None),
            ppl(16384, 4.0, ppl_window_mean=math.nan, ppl_token_weighted=math.nan)]  # fmt: skip
    save(tmp_path, "ppl", rows)
    text = page_of(tmp_path)
    assert "∞" in text and "not a number" in text
    assert "2 values are not finite and not drawn." in text
    save(tmp_path, "ppl", [rows[1]])
    text = page_of(tmp_path)
    StrictPage(text)
    assert "∞" in text and "<figure>" not in text


def test_a_passkey_table_has_trials_interval_and_loss(tmp_path):
    save(tmp_path, "passkey", [passkey(4096, i < 3, i) for i in range(5)])
    table = table_after(page_of(tmp_path), "Passkey retrieval")
    assert "60 %<small>3 of 5</small><small>23 to 88 %</small><small>loss 0.86</small>" in table
    (row,) = data_of(tmp_path, "passkey")
    assert float(row["share"]) == 0.6 and float(row["wilson_low"]) == pytest.approx(
        0.2307, abs=1e-4
    )


def test_needle_perplexity_is_exp_of_the_mean_loss(tmp_path):
    save(tmp_path, "needle", [needle(4096, 1.0, 0, nll=0.5), needle(4096, 0.5, 1, nll=1.5)])
    text = page_of(tmp_path)
    assert f"{math.exp(1.0):.2f}" in table_after(text, "Needle perplexity, single")
    assert "75 %<small>2</small>" in table_after(text, "Needle retrieval, single")


def test_benchmarks_are_a_table_of_models_and_tasks(tmp_path):
    save(tmp_path, "short", [
        short("arc", 0.53, 0.012) | whose("a"), short("arc", 0.51, None) | whose("b"),
        short("wiki", 9.5, None, metric="word_perplexity", limit=20) | whose("b"),
        short("wiki", 8.5, 0.25, metric="word_perplexity") | whose("a"),
    ])  # fmt: skip
    text = page_of(tmp_path)
    table = table_after(text, "Short benchmarks")
    assert "<b>53.0</b><small>± 1.2</small>" in table and "<td>51.0<small>" in table
    assert "<b>8.500</b>" in table and "arc<small>acc_norm, 10-shot</small>" in table
    assert "(limit 20): they are no benchmark scores" in text
    assert not (tmp_path / "figures").exists()


def test_text_from_the_records_cannot_break_the_page(tmp_path):
    evil = "<script>&\"'$x_1$"
    fields = whose(evil, evil, evil, evil, evil) | {"checkpoint": evil, "config_sha256": evil}
    for kind, row in (
        ("ppl", ppl(4096, 3.0, evil, evil, sources=[evil])),
        ("passkey", passkey(4096, True, evil, 0.5, scoring=evil, seed=evil)),
        ("needle", needle(4096, 1.0, task=evil)),
        ("short", short(evil, 0.5, metric=evil, num_fewshot=evil, limit=evil)),
    ):
        save(tmp_path, kind, [row | fields])
    text = page_of(tmp_path)
    StrictPage(text)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 12


def test_the_same_input_gives_the_same_bytes(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0), ppl(8192, 3.0)])
    save(tmp_path, "passkey", [passkey(4096, True, 0, 0.5)])
    before = page_of(tmp_path)
    images = {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert page_of(tmp_path) == before
    assert {path: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == images


def test_facts_of_a_run_stand_beside_its_numbers(tmp_path):
    save(tmp_path, "ppl", [ppl(4096, 3.0)])
    facts = {"Export": {"Largest <difference>": 3.1e-6, "Same text": True, "deep": {"a": 1.5}}}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    text = page_of(tmp_path)
    rows = re.findall(r'<th scope="row">(.*?)</th><td class="text">(.*?)</td>', text)
    assert "<h2>Export</h2>" in text
    assert rows[-3:] == [
        ("Largest &lt;difference&gt;", "3.10e-06"), ("Same text", "yes"), ("deep, a", "1.5"),
    ]  # fmt: skip
    (tmp_path / "facts.json").write_text('{"Export": 1}')
    with pytest.raises(ValueError, match=r"facts.json: must hold objects of names and values"):
        page_of(tmp_path)


def test_folders_of_one_name_keep_their_factors_and_facts(tmp_path):
    for name, factor in (("a", 4.0), ("b", 5.0)):
        folder = tmp_path / name / "eval"
        save(folder, "ppl", [ppl(4096, factor)])
        LongRopeConfig(1e4, 16, 4096, (FactorSet(16384, (factor,) * 8),)).save(folder / "f.json")
        (folder / "facts.json").write_text(json.dumps({"Run": {"factor": factor}}))
    page, _ = write_report([tmp_path / "a/eval", tmp_path / "b/eval"], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert "<h2>a/eval: Run</h2>" in text and "<h2>b/eval: Run</h2>" in text
    table = (tmp_path / "tables" / "rescale_factors.csv").read_text()
    assert "a/eval/f.json" in table and "b/eval/f.json" in table
    write_report([tmp_path / "a", tmp_path / "a/eval"], tmp_path / "report.html")
    table = (tmp_path / "tables" / "rescale_factors.csv").read_text()
    assert {row.split(",")[0] for row in table.splitlines()[1:]} == {"a/eval/f.json"}


def test_the_output_can_lie_elsewhere(tmp_path):
    save(tmp_path / "run", "short", [short("arc", 0.5)])
    page, _ = write_report(tmp_path / "run", tmp_path / "site" / "index.html")
    assert page == tmp_path / "site" / "index.html" and page.is_file()
    assert (tmp_path / "site" / "tables" / "short_benchmarks.csv").is_file()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["short.jsonl"]
    with pytest.raises(ValueError, match="is a directory"):
        write_report(tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match=r"no directory to report on"):
        write_report([])


def test_neutral_colours_follow_the_theme(text):
    svg = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    colours = {value.upper() for value in re.findall(r": (#[0-9a-fA-F]{6})\b", svg)}
    dark = text[text.index("@media screen and (prefers-color-scheme: dark)") :]
    for color, variable in NEUTRALS.items():
        assert f'svg [style*="stroke: {color}"] {{ stroke: var({variable}) !important; }}' in dark
        assert f"{variable}: #" in dark
    assert {look[0].upper() for look in LOOKS.values()} & colours
    assert "@media print" in text


def test_the_command_prints_the_tables_and_names_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("one", 3.0), ("two", 4.0)):
        save(tmp_path / name, "ppl", [ppl(4096, value), ppl(8192, value + 1)])
    save(tmp_path / "one", "passkey", [passkey(4096, True)])
    assert main(["report", "one", "two"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Perplexity by sequence length (truncated)", "              4k     8k",
        "------------------------", "base (one)  3.00*  4.00*", "base (two)  4.00   5.00",
        "* lowest of its column", "", "Passkey retrieval, teacher-forced", "               4k",
        "-----------------", "base (one)  100 %", "wrote report.html, figures and tables",
    ]  # fmt: skip
    assert (tmp_path / "report.html").is_file()
    assert main(["report", "one", "absent"]) == 2
    assert capsys.readouterr().err.startswith("longrope report: error: absent is no directory")


def test_a_grid_too_large_for_numbers_and_a_bar_for_each_length_are_laid_out(tmp_path, recwarn):
    lengths = [2**i for i in range(8, 40)]
    save(tmp_path, "passkey", [
        passkey(n, True, trial, depth) | whose("x" * 70)
        for n in lengths for depth in (0.0, 1.0, None) for trial in range(10)
    ])  # fmt: skip
    assert "passkey_by_depth.png" in page_of(tmp_path)
    assert not [item for item in recwarn if "layout" in str(item.message)]


def test_published_values_stand_beside_ours_with_the_difference(tmp_path, capsys):
    rows = [
        ppl(4096, 3.8, **whose("LLaMA2-7B", "none")),
        ppl(8192, 3.33, **whose("LLaMA2-7B", "ft=128k")),
    ]
    save(tmp_path / "runs", "ppl", rows)
    (tmp_path / "table5.csv").write_text(
        "# arXiv 2402.13753\ntable,row,column,value,source\n"
        'perplexity,No extension,4k,3.58,table 5\nperplexity,ft=128k,8k,>1e4,table 5\n'
        "perplexity,ft=128k,256k,1.88,table 5\n"
    )  # fmt: skip
    command = ["report", str(tmp_path / "runs"), "--expect", str(tmp_path / "table5.csv")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"perplexity: No extension, 4k +3\.80 +3\.58 +\+6\.1 % +table 5", shown)
    assert re.search("perplexity: ft=128k, 8k +3.33 +>1e4 +\N{EN DASH} +table 5", shown)
    assert "1 of 3 published values were not measured here" in shown
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert "+6.1 %" in table_after(page, "Beside table5.csv")
    for value, difference in (("7.6e-1", "+400.0 %"), ("-1.0E1", "-138.0 %"), (" 3.8 ", "+0.0 %")):
        (tmp_path / "table5.csv").write_text(  # with the mark that spreadsheets write
            f"table,row,column,value,source\nperplexity,No extension,4k,{value},x\n",
            encoding="utf-8-sig",
        )
        assert main(command) == 0
        assert difference in capsys.readouterr().out
    (tmp_path / "table5.csv").write_text(
        "table,row,column,value,source\nperplexity,none,4k,much,x\n"
    )
    assert main(command) == 2
    assert "is not table,row,column,value,source with a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown", "difference"),
    [(1234.5, "1,234", r"\+15402.5 %"), (2.1e7, r"2.1e\+07", r"\+263818995.5 %")],
)
def test_the_difference_is_of_the_number_as_a_whole(tmp_path, value, shown, difference):
    save(tmp_path / "runs", "ppl", [ppl(4096, value)])
    (tmp_path / "e.csv").write_text(
        "table,row,column,value,source\nperplexity,base,4k,7.96,table 5\n"
    )
    _, tables = write_report(tmp_path / "runs", expected=tmp_path / "e.csv")
    assert re.search(rf"base, 4k +{shown} +7.96 +{difference}", tables)


@pytest.fixture
def searched(tmp_path):
    """What two searches a window found, as examples/paper measures it, and a way to expect it."""
    for name, better in (("lambda", 0), ("lambda_and_start_tokens", 1)):
        for length in (8192, 16384):
            window = f"{name}_{length // 1024}k"
            row = ppl(length, length / 1024 - better, **whose(label=name, config=f"{window}.json"))
            save(tmp_path / "runs" / window, "ppl", [row])

    def expect(*lines):
        text = "".join(f"perplexity,{line},t1\n" for line in lines)
        (tmp_path / "e.csv").write_text(f"table,row,column,value,source\n{text}")
        return write_report(tmp_path / "runs", expected=tmp_path / "e.csv")[1]

    return expect


def test_factors_of_a_window_each_are_found_by_their_common_name(searched):
    shown = searched("lambda,8k,8.0", "lambda,16k,16.0", "lambda_and_start_tokens,16k,15.0")
    assert re.search(r"perplexity: lambda, 8k +8.00 +8.0 ", shown)
    assert re.search(r"perplexity: lambda, 16k +16.00 +16.0 ", shown)
    assert re.search(r"perplexity: lambda_and_start_tokens, 16k +15.00 +15.0 ", shown)


def test_a_part_of_a_word_is_not_the_row_that_is_expected(searched):
    assert "1 of 1 published values were not measured" in searched("start_tokens,8k,7.0")


def test_a_name_of_two_rows_with_a_value_there_is_refused(tmp_path):
    rows = [ppl(4096, 3.0, **whose(label=f"{letter} one")) for letter in "ab"]
    save(tmp_path / "runs", "ppl", [*rows, ppl(8192, 4.0, **whose(label="a one"))])
    path = tmp_path / "e.csv"
    path.write_text("table,row,column,value,source\nperplexity,one,8k,4.0,t1\n")
    assert "perplexity: one, 8k" in write_report(tmp_path / "runs", expected=path)[1]
    path.write_text("table,row,column,value,source\nperplexity,one,4k,3.0,t1\n")
    with pytest.raises(ValueError, match="'one' may be any of the rows a one, b one of perplexity"):
        write_report(tmp_path / "runs", expected=path)


def test_one_place_in_several_tables_is_several_lines(tmp_path):
    save(tmp_path / "runs", "ppl", [ppl(8192, 4.0)])
    save(tmp_path / "runs", "passkey", [passkey(8192, True)])
    lines = ["table,row,column,value,source", "perplexity,base,8k,4.0,t5", "passkey,base,8k,80,t5"]
    (tmp_path / "e.csv").write_text("\n".join(lines) + "\n")
    _, tables = write_report(tmp_path / "runs", expected=tmp_path / "e.csv")
    assert re.search(r"perplexity: base, 8k +4.00 +4.0 +\+0.0 %", tables)
    assert re.search(r"passkey: base, 8k +100 % +80 +\+25.0 %", tables)
    (tmp_path / "e.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(ValueError, match=r"e.csv: t5 has two values of perplexity: base, 8k; give"):
        write_report(tmp_path / "runs", expected=tmp_path / "e.csv")


def test_a_part_of_the_window_without_any_loss_is_drawn(tmp_path):
    row = ppl(4096, 3.0)
    row["nll_by_position"][0]["nll"] = 0.0
    save(tmp_path, "ppl", [row])
    assert "perplexity_by_position.png" in page_of(tmp_path)
    for bucket in row["nll_by_position"]:
        bucket["nll"] = 0.0
    save(tmp_path, "ppl", [row])
    assert "perplexity_by_position.png" in page_of(tmp_path)
