"""plumbing/checkpoint.py: files that are whole or not there, and one run in a folder."""

import hashlib
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from plumbing import checkpoint
from plumbing.cli import UserError, flag

ROOT = Path(__file__).parents[1]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(name, config):
    model = {"linear": torch.nn.Linear}[name](**config)
    model.config = types.SimpleNamespace(vocab_size=config["out_features"])
    return model


def state(**changes):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    return (
        dict(
            model_name="linear", config=dict(in_features=2, out_features=3), settings=dict(seed=1),
            tokenizer=dict(kind="char", vocab=["a", "b", "c"]), data_sha256="00", step=7, best=1.5,
            seconds=2.0, model=model.state_dict(),
        )
        | changes
    )  # fmt: skip


# ---- checkpoints ---------------------------------------------------------------------------------
def test_there_and_back(work):
    checkpoint.save(Path("out/last.pt"), state(optimizer={"a": [1]}, ema=None))
    ckpt, model = checkpoint.load("out/last.pt", make)
    assert ckpt["format"] == checkpoint.FORMAT and ckpt["optimizer"] == {"a": [1]}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state()["model"].items())
    assert os.listdir("out") == ["last.pt"]


def test_what_is_no_checkpoint(work):
    def fails(path, message):
        with pytest.raises(UserError, match=message) as e:
            checkpoint.load(path, make)
        assert "\n" not in str(e.value)

    fails("my out/ckpt.pt", "no checkpoint at my out.ckpt.pt; train one: .* --out_dir 'my out'")
    checkpoint.save(Path("out/last.pt"), state())
    fails("out/ckpt.pt", "only last.pt: no validation yet: --resume goes on")
    raw, path = Path("out/last.pt").read_bytes(), Path("out/last.pt")
    middle = len(raw) // 3
    for bad in (b"", raw[:middle], raw[:-1], b"PK\3\4", b"text"):
        path.write_bytes(bad)
        fails(path, "last.pt is damaged, cut off or not a checkpoint")
    torch.save(state() | {"format": "lomdm checkpoint 2"}, path)
    fails(path, "was not written by this version of train_char.py; train again")
    torch.save([1], path)
    fails(path, "was not written by this version of train_char.py; train again")
    for change in (
        dict(model_name="gpt"),
        dict(config=dict(width=2)),
        dict(model={}),
        dict(model=dict(state()["model"], bias=torch.zeros(4))),
    ):
        checkpoint.save(path, state(**change))
        fails(path, "last.pt does not hold the model that it says")


def test_loading_runs_no_code(work):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    torch.save(state() | {"format": checkpoint.FORMAT, "best": Evil()}, "ckpt.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.load("ckpt.pt", make)
    assert not Path("ran").exists()


def test_files_are_whole(work, monkeypatch):
    """What fails halfway leaves the old file, and nothing besides it."""
    checkpoint.save(Path("out/last.pt"), state())
    before = Path("out/last.pt").read_bytes()

    def fails_with(error):
        def write(path):
            path.write_bytes(b"half")
            raise error

        return write

    for error, kind, message in [
        (OSError(28, "No space left on device"), UserError, "cannot write out/last.pt: No space"),
        (RuntimeError("write failed"), UserError, "is the disk full"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ]:
        with pytest.raises(kind, match=message):
            checkpoint.write_file(Path("out/last.pt"), fails_with(error))
        assert Path("out/last.pt").read_bytes() == before and os.listdir("out") == ["last.pt"]
    for bad in ("out", "out/last.pt/x", "/", "."):
        with pytest.raises(UserError, match="cannot write"):
            checkpoint.write_file(Path(bad), lambda path: path.write_text("a"))


# ---- one run in a folder -------------------------------------------------------------------------
def test_one_run_at_a_time(work):
    """The lock holds as long as its process, and ends with it, kill -9 included."""
    code = "from plumbing.checkpoint import only_run; held = only_run('out'); print(1, flush=True)"
    argv = [sys.executable, "-c", f"{code}; import sys; sys.stdin.read()"]
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(argv, **how, env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == b"1\n"
        os.symlink("out", "link")
        for name in ("out", "link"):
            with pytest.raises(UserError, match=f"another run is writing to {name}; take another"):
                checkpoint.only_run(name)
        assert checkpoint.only_run("other")
        other.kill()
        other.wait()
    held = checkpoint.only_run("out")  # of two in one process as well
    with pytest.raises(UserError, match="another run"):
        checkpoint.only_run("out")
    del held
    assert checkpoint.only_run("out")


def test_folders_that_are_none_for_a_run(work, monkeypatch):
    Path("file").write_text("mine")
    Path("in/here").mkdir(parents=True)
    monkeypatch.chdir("in/here")
    for name in (".", "..", "../..", str(work), "../../in/here"):
        with pytest.raises(UserError, match="--out_dir must be a folder of its own, not the one"):
            checkpoint.only_run(name)
    for name in ("../../file", "../../file/out"):
        with pytest.raises(UserError, match="cannot write to --out_dir"):
            checkpoint.only_run(name)
    assert Path("../../file").read_text() == "mine"


def test_an_earlier_run_is_moved_and_nothing_else(work, capsys):
    Path("real").mkdir()
    os.symlink("real", "out")
    for n in (1, 2):
        held = checkpoint.only_run("out")
        checkpoint.set_aside("out")
        for name in ("ckpt.pt", "last.pt", "log.jsonl", "notes.txt")[: 5 - n]:
            Path("out", name).write_text(f"{name} {n}")
        with pytest.raises(UserError, match="another run"):  # the lock has not moved away
            checkpoint.only_run("out")
        del held
    assert capsys.readouterr().out == f"out held an earlier run; it is now in {work}/real.1\n"
    assert Path("out").is_symlink() and Path("out/last.pt").read_text() == "last.pt 2"
    assert Path("out/notes.txt").read_text() == "notes.txt 1"
    assert sorted(os.listdir("real.1")) == ["ckpt.pt", "last.pt", "log.jsonl"]
    assert Path("real.1/log.jsonl").read_text() == "log.jsonl 1"
    Path("plain").mkdir()
    Path("plain/last.pt").write_text("3")
    Path("plain.1").mkdir()
    checkpoint.set_aside("plain")
    assert capsys.readouterr().out == "plain held an earlier run; it is now in plain.2\n"
    assert os.listdir("plain.2") == ["last.pt"] and os.listdir("plain") == []


# ---- the log -------------------------------------------------------------------------------------
def test_the_log(work):
    """A torn line, the end of a run that was killed, changes nothing."""
    with pytest.raises(UserError, match="cannot read out.log.jsonl: No such file"):
        checkpoint.read_log("out")
    with pytest.raises(UserError, match="cannot write out.log.jsonl"):
        checkpoint.log("out", step=1)
    Path("out").mkdir()
    checkpoint.trim_log("out", 3)  # none there
    assert os.listdir("out") == []
    checkpoint.log("out", settings=dict(seed=1))
    rows = [
        dict(step=2, loss=1.0),
        dict(step=2, note="also of step 2"),
        dict(step=2, val=3.0, kind="exact"),
        dict(step=2, val=4.0, kind="other"),
        dict(step=4, loss=0.5),
    ]
    for row in rows:
        checkpoint.log("out", **row)
    checkpoint.log("out", step=4, val=2.0, kind="exact")
    with open("out/log.jsonl", "a") as f:
        f.write('{"step": 5, "lo')
    want = [dict(settings=dict(seed=1)), *rows, dict(step=4, val=2.0, kind="exact")]
    assert checkpoint.read_log("out") == want
    checkpoint.trim_log("out", 2)
    lines = Path("out/log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == want[:5]
    checkpoint.log("out", step=3, loss=0.1)
    assert checkpoint.read_log("out") == [*want[:5], dict(step=3, loss=0.1)]
    Path("out/log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="does not begin with the settings of a run"):
        checkpoint.read_log("out")


def test_a_new_run_and_one_that_goes_on(work, capsys):
    Path("out").mkdir()
    about = dict(settings=dict(seed=1), tokenizer=dict(kind="char"), code="c0de")
    checkpoint.begin("out", None, about)
    [header] = checkpoint.read_log("out")
    assert header == dict(settings=dict(seed=1), code="c0de", torch=torch.__version__)
    for step in (1, 2, 3):
        checkpoint.log("out", step=step)
    checkpoint.begin("out", dict(step=2), about)
    assert checkpoint.read_log("out") == [header, dict(step=1), dict(step=2)]
    checkpoint.begin("out", None, about)
    assert checkpoint.read_log("out") == [header] and len(checkpoint.read_log("out.1")) == 3
    assert capsys.readouterr().out == "out held an earlier run; it is now in out.1\n"


def test_the_digest_of_the_code(work):
    Path("one.py").write_text("a")
    Path("two.py").write_text("b")
    digest = checkpoint.code_digest(["one.py", "missing.py", Path("two.py")])
    assert digest == hashlib.sha256(b"ab").hexdigest()[:12]
    assert digest != checkpoint.code_digest(["two.py", "one.py"])


# ---- going on ------------------------------------------------------------------------------------
@dataclass
class Settings:
    out_dir: str = flag("out", "", resume=True)
    max_iters: int | None = flag(None, "", resume=True)
    n_layer: int = flag(1, "")
    tokenizer: str | None = flag(None, "")
    device: str | None = flag(None, "", resume=True)
    dtype: str | None = flag(None, "", resume=True, follows="device")


def test_what_may_change():
    same = dict(n_layer=1, tokenizer="char", device="cuda:0", dtype="bfloat16")
    saved = dict(out_dir="old", max_iters=5, **same)
    given = dict(out_dir="good", max_iters=9, **same)
    assert checkpoint.resumable(saved, given, Settings) == given
    assert checkpoint.resumable(saved, {}, Settings) == saved | dict(out_dir="out")  # it was moved
    for device, dtype in [("cuda:1", "bfloat16"), ("cpu", None)]:
        assert checkpoint.resumable(saved, dict(device=device), Settings)["dtype"] == dtype
    with pytest.raises(UserError, match="the run in out has other settings than this version"):
        checkpoint.resumable(saved | dict(more=1), {}, Settings)
    with pytest.raises(UserError, match="--n_layer 2 is not what the run in out has .1.; leave it"):
        checkpoint.resumable(saved, dict(n_layer=2), Settings)
    with pytest.raises(UserError, match="--tokenizer gpt2 is not what the run in good has .none."):
        given = dict(out_dir="good", tokenizer="gpt2")
        checkpoint.resumable(saved | {"tokenizer": None}, given, Settings)
