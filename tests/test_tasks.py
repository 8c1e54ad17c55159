"""Task sources, the embedded word tables, pools and errors."""

import collections
import functools
import hashlib
import http.server
import json
import os
import threading
import unicodedata
from pathlib import Path
from random import Random

import pytest

from icl_lib.files.hashes import fingerprint
from icl_lib.files.paths import data_files
from icl_lib.tasks import Task, UnknownTask, load_tasks, read_table, select_tasks, tasks

# Pairs per file of Hendel et al. as stored, one less for the four that begin with a header line.
PAPER = {
    "country_capital": 139,
    "football_player_position": 952,
    "location_continent": 957,
    "location_country": 714,
    "location_language": 737,
    "location_religion": 368,
    "person_language": 923,
    "person_profession": 821,
    "antonyms": 162,
    "plural_singular": 172,
    "singular_plural": 173,
    "present_simple_gerund": 1008,
    "present_simple_past_perfect": 110,
    "present_simple_past_simple": 1005,
    "en_es": 719,
    "en_fr": 739 - 1,
    "en_it": 757,
    "es_en": 763 - 1,
    "fr_en": 772 - 1,
    "it_en": 758 - 1,
}
HEADERS = {"en_fr", "es_en", "fr_en", "it_en"}


def registered(source):
    return [row["path"] for row in read_table(tasks.REGISTRY) if row["source"] == source]


def write_stand_ins(folder: Path):
    """Files of the published names, sizes and header lines, with words of our own; a few pairs for function vectors."""
    for path in registered("paper"):
        file = folder / "icl_task_vectors" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pairs = dict([file.stem.split("_")] if file.stem in HEADERS else [])
        pairs |= {f"{file.stem} {i}": f"output {i % 7}" for i in range(PAPER[file.stem])}
        file.write_text(json.dumps(pairs), encoding="utf-8")
    for path in registered("function_vectors"):
        file = folder / "function_vectors" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{"input": f"in {i}", "output": f"out {i}"} for i in range(5)]), encoding="utf-8")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """ICL_LIB_TASK_DATA on a real copy where there is one, else on stand-ins of the same shape."""
    folder = Path(os.environ.get(tasks.DATA_VARIABLE, Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "icl_task_vectors" / "knowledge").is_dir():
        folder = tmp_path / "published"
        write_stand_ins(folder)
    monkeypatch.setenv(tasks.DATA_VARIABLE, str(folder))
    return folder


def test_paper_suite_has_the_published_tasks_and_counts(published):
    suite = load_tasks("paper")
    counts = {name: len(task.pairs) for name, task in suite.items()}
    assert counts == PAPER | {"algo_last": 300, "algo_first": 300, "algo_second": 300}
    groups = collections.Counter(task.group for task in suite.values())
    assert groups == {"knowledge": 8, "linguistic": 6, "translation": 6, "algorithmic": 3}
    for name in HEADERS:
        assert tuple(name.split("_")) not in suite[name].pairs


def test_word_list_tasks_follow_the_published_generator(published):
    suite = load_tasks("paper")
    words = list(json.loads((published / "icl_task_vectors/translation/en_es.json").read_text(encoding="utf-8")))
    rng = Random(0)  # the recipe spelled out: 900 lists in a row, a length drawn before each
    lists = []
    for _ in range(900):
        length = rng.randint(4, 4)
        lists.append(rng.sample(words, length))
    for name, start, position in (("algo_last", 0, 3), ("algo_first", 300, 0), ("algo_second", 600, 1)):
        expected = [(", ".join(chosen), chosen[position]) for chosen in lists[start : start + 300]]
        assert list(suite[name].pairs) == expected


def test_only_lists_of_words_are_shown_less_often(published):
    for n in (31, 8):
        shown = {name: task.shots(n, 16) for name, task in load_tasks("paper").items()}
        assert shown == dict.fromkeys(PAPER, n) | dict.fromkeys(("algo_last", "algo_first", "algo_second"), min(n, 16))
    assert {task.shots(31, 16) for task in load_tasks("embedded").values()} == {31}


def test_function_vectors_are_lists_of_input_and_output(published):
    suite = load_tasks("function_vectors")
    assert len(suite) == 53
    assert collections.Counter(task.group for task in suite.values()) == {"abstractive": 29, "extractive": 24}
    raw = json.loads((published / "function_vectors/abstractive/antonym.json").read_text(encoding="utf-8"))
    assert suite["antonym"].pairs == tuple((entry["input"], entry["output"]) for entry in raw)


def test_missing_local_files_and_no_network_name_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(tasks.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="20 of 20 files .*ICL_LIB_TASK_DATA"):
        load_tasks("paper")
    monkeypatch.delenv(tasks.DATA_VARIABLE)
    monkeypatch.setattr(tasks.pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setitem(tasks.URLS, "paper", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(FileNotFoundError, match="ICL_LIB_TASK_DATA"):
        load_tasks("paper")


def test_download_is_checked_against_its_hash(tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    (served / "colours.json").write_text('{"sky": "blue", "grass": "green"}')
    digest = hashlib.sha256((served / "colours.json").read_bytes()).hexdigest()
    (tmp_path / "registry.tsv").write_text(f"source\tpath\tsha256\nfunction_vectors\tcolours.json\t{digest}\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv(tasks.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(tasks.pooch, "os_cache", lambda _: tmp_path / "cache")
    monkeypatch.setitem(tasks.URLS, "function_vectors", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(tasks, "REGISTRY", tmp_path / "registry.tsv")
    try:
        assert load_tasks("function_vectors")["colours"].pairs == (("sky", "blue"), ("grass", "green"))
        (served / "colours.json").write_text('{"sky": "red"}')
        (tmp_path / "cache" / "function_vectors" / "colours.json").unlink()
        with pytest.raises(ValueError, match="hash"):
            load_tasks("function_vectors")
    finally:
        server.shutdown()
        server.server_close()


def test_embedded_suite():
    suite = load_tasks("embedded")
    assert len(suite) == 28
    groups = collections.Counter(task.group for task in suite.values())
    assert groups == {"knowledge": 10, "linguistic": 6, "translation": 9, "algorithmic": 3}
    for task in suite.values():
        inputs = [x for x, _ in task.pairs]
        assert len(set(inputs)) == len(inputs) >= 40, task.name
        assert all(x != y for x, y in task.pairs), task.name
    assert dict(suite["country_capital"].pairs)["New Zealand"] == "Wellington"
    assert dict(suite["location_country"].pairs)["Buenos Aires"] == "Argentina"
    assert dict(suite["present_past"].pairs)["sing"] == "sang"
    assert dict(suite["en_fr"].pairs)["dog"] == "chien" and dict(suite["fr_en"].pairs)["chien"] == "dog"
    assert dict(suite["fr_it"].pairs)["chien"] == "cane" and dict(suite["it_es"].pairs)["cane"] == "perro"
    assert dict(suite["word_language"].pairs)["chien"] == "French"
    assert dict(suite["noun_category"].pairs)["dogs"] == "animal"
    assert dict(suite["next_item"].pairs)["Sunday"] == "Monday" and dict(suite["item_kind"].pairs)["Sunday"] == "day"
    assert {(y, x) for x, y in suite["next_item"].pairs} == set(suite["previous_item"].pairs)


def test_almost_every_input_belongs_to_several_tasks():
    """A zero-shot prompt must not give the task away: only the ends of four runs of items have one task alone."""
    suite = load_tasks("embedded")
    owners = collections.Counter(x for task in suite.values() for x, _ in task.pairs)
    assert {x for x, n in owners.items() if n == 1} == {"twenty", "twentieth", "Neptune", "omega"}
    assert {x for x, _ in suite["country_capital"].pairs} <= {x for x, _ in suite["location_language"].pairs}
    assert {x for x, _ in suite["es_fr"].pairs} == {x for x, _ in suite["es_en"].pairs}


def test_items_are_runs_without_branches():
    """Each item has one successor and one predecessor of its own kind, so next and previous are functions."""
    rows = read_table("items")
    items, following = [row["item"] for row in rows], [row["next"] for row in rows]
    assert len(set(items)) == len(items) == 99 and len(set(following)) == len(following)
    kind = {row["item"]: row["kind"] for row in rows}
    assert all(kind.get(row["next"], row["kind"]) == row["kind"] for row in rows)


def test_word_tables_have_no_homographs():
    """Every word that can be an input stands once, in one column of one table, even without accents and case."""
    places = collections.defaultdict(set)
    inputs = {
        "countries": ["country", "capital"],
        "people": ["person"],
        "nouns": ["singular", "plural", "spanish", "french", "italian"],
        "adjectives": ["word", "spanish", "french", "italian"],
        "verbs": ["verb", "gerund", "past", "participle"],
    }
    outputs = {"countries": ["currency"], "people": ["profession"], "nouns": ["category"], "items": ["kind"]}

    def note(word, place):
        plain = unicodedata.normalize("NFD", word.lower())
        places["".join(c for c in plain if not unicodedata.combining(c))].add(place)

    for table, columns in inputs.items():
        for number, row in enumerate(read_table(table)):
            for column in columns:
                note(row[column], (table, column, number))
    for row in read_table("items"):  # an item stands twice, as the next of another
        for word in (row["item"], row["next"]):
            note(word, ("items", word))
    assert {word: found for word, found in places.items() if len(found) > 1} == {}
    for table, columns in outputs.items():
        for row in read_table(table):
            assert not any(row[column].lower() in places for column in columns), row


def test_word_tables_agree_with_each_other():
    countries, people, adjectives = read_table("countries"), read_table("people"), read_table("adjectives")
    assert {row["country"] for row in people} <= {row["country"] for row in countries}
    assert {row["language"] for row in people} <= {row["language"] for row in countries}
    assert {row["continent"] for row in countries} == {"Europe", "Asia", "Africa", "America", "Oceania"}
    antonyms = {row["word"]: row["antonym"] for row in adjectives}
    assert all(antonyms[antonyms[word]] == word != antonyms[word] for word in antonyms)
    sizes = {
        table: len(read_table(table)) for table in ("countries", "people", "nouns", "adjectives", "verbs", "items")
    }
    assert sizes == {"countries": 64, "people": 56, "nouns": 84, "adjectives": 46, "verbs": 53, "items": 99}


def test_pools_are_disjoint_exhaustive_and_seeded():
    task = load_tasks("embedded")["en_es"]
    pools = [set(task.pool(use)) for use in ("extraction", "optimisation", "evaluation")]
    assert [len(pool) for pool in pools] == [52, 39, 39]
    assert set.union(*pools) == set(task.pairs)
    assert task.pool("evaluation") == task.pool("evaluation", seed=0) != task.pool("evaluation", seed=1)
    # A repeated input stays in one pool, whatever the order of the pairs.
    twice = Task("t", tuple((f"in {i % 20}", f"out {i}") for i in range(40)), "", "test")
    inputs = [{x for x, _ in twice.pool(use)} for use in ("extraction", "optimisation", "evaluation")]
    assert sum(map(len, inputs)) == len(set.union(*inputs)) == 20
    backwards = Task("t", twice.pairs[::-1], "", "test")
    assert set(backwards.pool("extraction")) == set(twice.pool("extraction"))
    with pytest.raises(ValueError, match="pools are extraction, optimisation, evaluation; got 'test'"):
        task.pool("test")
    with pytest.raises(ValueError, match="extraction pool of task 'one' is empty"):
        Task("one", (("a", "b"),), "", "test").pool("extraction")


def test_folder_of_files(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "colours.tsv").write_text("input\toutput\nthe sky\tblue\nœuf\twhite\n", encoding="utf-8")
    (tmp_path / "sounds.json").write_text('{"cow": "moo"}')
    suite = load_tasks(tmp_path)
    assert suite["colours"] == Task("colours", (("the sky", "blue"), ("œuf", "white")), "own", str(tmp_path))
    assert suite["sounds"].pairs == (("cow", "moo"),)
    (tmp_path / "own" / "sounds.json").write_text('{"dog": "woof"}')
    with pytest.raises(ValueError, match="two files .* task named 'sounds'"):
        load_tasks(tmp_path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.tsv",
            "input\toutput\nx\ty\nz\n",
            r"a\.tsv, line 3: expected 2 non-empty columns .*\(input, output\), got 1: 'z'",
        ),
        ("a.tsv", "input\toutput\nx\t\n", "a.tsv, line 2: expected 2 non-empty"),
        ("a.tsv", "word\tother\nx\ty\n", "a.tsv, line 1: expected the header input <tab> output, got"),
        ("a.tsv", "input\toutput\n", "'a' from .* has no pairs"),
        ("a.json", "{", "a.json is not valid JSON, line 1"),
        ("a.json", '{"x": 3}', r"a.json: expected .* got the pair \('x', 3\)"),
        ("a.json", '[{"input": "x"}]', "a.json: expected a JSON object"),
        ("a.json", '{"x": " "}', "pair with an empty side"),
    ],
)
def test_malformed_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tasks(tmp_path)


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="'embedded', 'paper', 'function_vectors'"):
        load_tasks("embeded")
    with pytest.raises(FileNotFoundError, match="holds no .json or .tsv"):
        load_tasks(tmp_path)
    suite = load_tasks("embedded")
    assert list(select_tasks(suite, ["en_it", "antonyms"])) == ["en_it", "antonyms"]
    with pytest.raises(UnknownTask) as info:
        select_tasks(suite, ["antonym"])
    assert isinstance(info.value, KeyError)
    assert str(info.value).startswith("no task 'antonym': did you mean 'antonyms'?")


def test_what_other_programs_leave_in_a_folder_is_no_data(tmp_path):
    folder = tmp_path / ".cache" / "snapshot"  # hidden above the folder says nothing
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "colours.json").write_text('{"sky": "blue"}')
    (folder / "birds.tsv").write_text("input\toutput\nowl\tnight\n")
    before, expected = fingerprint(folder), [folder / "birds.tsv", folder / "own" / "colours.json"]
    for name in (
        ".cache/huggingface/download/own/colours.json.metadata.json",
        ".cache/huggingface/download/own/colours.json.lock",
        ".git/config.json",
        "own/.ipynb_checkpoints/colours-checkpoint.json",
        "own/.colours.json.77.partial.json",
        "__pycache__/a.json",
        "__MACOSX/own/colours.json",
        "own/colours.json~",
        "dataset_infos.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[1, 2]")
    (folder / "folder.json").mkdir()
    assert data_files(folder) == expected and data_files(folder, [".json"]) == expected[1:]
    assert list(load_tasks(folder)) == ["birds", "colours"]
    assert fingerprint(folder) == before
    (folder / "notes.md").write_text("more")
    assert fingerprint(folder) != before and data_files(folder, (".md",)) == [folder / "notes.md"]


@pytest.mark.parametrize("kind", ["object", "list", "tsv"])
def test_repeated_pairs_are_read_once_and_told(tmp_path, kind, recwarn):
    pairs = [("hot", "cold"), ("safe", "risky"), ("up", "down"), ("hot", "cold"), ("safe", "unsafe"), ("up", "down")]
    write = {
        "object": lambda: "{" + ", ".join(f'"{x}": "{y}"' for x, y in pairs) + "}",
        "list": lambda: json.dumps([{"input": x, "output": y} for x, y in pairs]),
        "tsv": lambda: "input\toutput\n" + "".join(f"{x}\t{y}\n" for x, y in pairs),
    }[kind]
    (tmp_path / f"a.{'tsv' if kind == 'tsv' else 'json'}").write_text(write())
    both = kind != "object"  # of a key of an object the last value counts, as in the published antonyms
    expected = {("hot", "cold"), ("safe", "unsafe"), ("up", "down")} | ({("safe", "risky")} if both else set())
    found = load_tasks(tmp_path)["a"].pairs
    assert set(found) == expected and len(found) == len(expected)
    (message,) = {str(w.message) for w in recwarn}
    assert "2 of 6 pairs repeat another" in message and "'safe' ('risky', 'unsafe')" in message
    assert str(tmp_path / "a.") in message and "'hot'" not in message
    assert ("a prompt shows one of them" if both else "the last one counts") in message


def test_published_pairs_are_as_they_were(published, recwarn):
    """Only product-company.json has pairs twice that were kept so far: 20 of 522. Nobody can mend these files: no
    warning.
    """
    for source in ("paper", "function_vectors"):
        for name, task in load_tasks(source).items():
            if task.group in ("algorithmic",) and source == "paper":
                continue
            path = published / tasks.FOLDERS[source] / task.group / f"{name}.json"
            raw = json.loads(path.read_text(encoding="utf-8"))
            raw = list(raw.items()) if isinstance(raw, dict) else [(entry["input"], entry["output"]) for entry in raw]
            assert list(task.pairs) == [pair for pair in dict.fromkeys(raw) if "_".join(pair) != name]
            assert len(raw) - len(set(raw)) in ((0, 20) if name == "product-company" else (0,))
    assert not recwarn.list


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "colours.json").write_text('{"sky": "blue"}')
    for suite, wrong, near in (
        (load_tasks("embedded"), "antonymz", "antonyms"),
        (load_tasks(tmp_path), "color", "colours"),
    ):
        with pytest.raises(UnknownTask, match=f"no task '{wrong}': did you mean '{near}'.*The {len(suite)} tasks are"):
            suite[wrong]
        assert isinstance(suite, dict) and suite.get(wrong) is None and wrong not in suite  # otherwise a plain dict
    assert dict(load_tasks(tmp_path)) == load_tasks(tmp_path) and list(load_tasks(tmp_path)) == ["colours"]


@pytest.mark.parametrize("source", ["./pairs", "~/pairs", "/no/such/pairs", "data/pairs"])
def test_a_missing_folder_of_tasks_is_named(source):
    with pytest.raises(
        FileNotFoundError, match=f"no folder '{source}' here, where /.*pairs would be.* pass 'embedded'"
    ):
        load_tasks(source)


def test_a_source_of_tasks_by_path_from_the_root_or_misspelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "colours.json").write_text('{"sky": "blue"}')
    monkeypatch.setattr("icl_lib.files.paths.root", lambda: tmp_path)
    monkeypatch.chdir("/")
    assert list(load_tasks("pairs")) == ["colours"]
    with pytest.raises(FileNotFoundError, match="no task source 'embeded': did you mean 'embedded'"):
        load_tasks("embeded")
