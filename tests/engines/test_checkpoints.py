"""What a model folder may hold: every kind of bad one is refused with its own code, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

from runtime.checkpoints.architectures import task_of
from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.model_types import ModelType, pretrained_model_type
from runtime.engines.transformers import load
from runtime.errors import DeployError, UserError
from runtime.spec import ModelSpec, Task


def code_of(path: object, task: Task | None = None) -> str:
    """The code of the error that `inspect` raises; its message and hint must be short and there."""
    with pytest.raises(UserError) as raised:
        inspect(str(path), task)
    assert raised.value.hint
    assert len(str(raised.value).splitlines()) <= 6
    return raised.value.code


def test_a_good_folder_is_described(tmp_path: Path) -> None:
    """Everything that is known without loading: architecture, lengths, type, size, files."""
    folder = models.placeholder(tmp_path / "good")
    found = inspect(str(folder))
    assert (found.path, found.task, found.model_type) == (str(folder), Task.GENERATE, "llama")
    assert (found.max_model_len, found.vocab_size, found.hidden_size) == (128, 10, 2)
    assert (found.dtype, found.num_parameters, found.has_chat_template) == ("float32", 6, False)
    assert found.files == ("config.json", "model.safetensors", "tokenizer.json")
    assert found.bytes == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "task", "template"),
    [
        ("chat", Task.GENERATE, True),
        ("plain", Task.GENERATE, False),
        ("encoder", Task.EMBED, False),
        ("sentence", Task.EMBED, False),
        ("classifier", Task.CLASSIFY, False),
    ],
)
def test_the_task_is_found(folders: Callable[[str], Path], name: str, task: Task, template: bool) -> None:
    """Real checkpoints say what they are for, whether they chat, and how many parameters they have."""
    found = inspect(str(folders(name)))
    assert (found.task, found.has_chat_template) == (task, template)
    assert found.num_parameters > 10_000
    assert found.sentence_transformers == (name == "sentence")


@pytest.mark.parametrize("wrong", models.BROKEN)
def test_a_broken_folder_is_refused(tmp_path: Path, wrong: str) -> None:
    """Each way to be broken has its code and a hint."""
    code, change = models.BROKEN[wrong]
    folder = models.placeholder(tmp_path / "folder")
    inspect(str(folder))
    change(folder)
    assert code_of(folder) == code


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    """A missing folder, a file, an empty path and a NUL character each say what is wrong."""
    (tmp_path / "file").write_text("")
    assert code_of(tmp_path / "nothing" / "here") == "checkpoint_missing"
    assert code_of(tmp_path / "file") == "checkpoint_not_folder"
    assert code_of("") == code_of("a\0b") == "checkpoint_path"


def test_home_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the home folder, and a link stands for the real folder."""
    folder = models.placeholder(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inspect("~/link").path == inspect(str(folder)).path == str(folder)


def test_only_the_roots_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With SQLEXT_ROOTS set, neither `..`, nor a name that begins alike, nor a link leads out of the roots."""
    inside, outside = models.placeholder(tmp_path / "models" / "a"), models.placeholder(tmp_path / "models2" / "b")
    (tmp_path / "models" / "link").symlink_to(outside)
    monkeypatch.setenv("SQLEXT_ROOTS", f"{tmp_path}/elsewhere:{tmp_path}/models")
    assert inspect(str(inside)).task is Task.GENERATE
    for path in (outside, tmp_path / "models" / ".." / "models2" / "b", tmp_path / "models" / "link"):
        assert code_of(path) == "checkpoint_outside_roots"
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    assert code_of(inside) == "checkpoint_outside_roots"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Missing rights are named as such, not as a damaged checkpoint."""
    folder = models.placeholder(tmp_path / "model")
    for method in ("open", "read_bytes"):
        real = getattr(Path, method)

        def refuse(path: Path, *args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(13, "Permission denied")
            return real(path, *args, **options)

        monkeypatch.setattr(Path, method, refuse)
    assert code_of(folder) == "checkpoint_unreadable"


def test_a_task_that_does_not_fit(folders: Callable[[str], Path]) -> None:
    """A language model also embeds; nothing else does what it is not made for."""
    assert inspect(str(folders("chat")), Task.EMBED).task is Task.EMBED
    assert code_of(folders("chat"), Task.CLASSIFY) == "checkpoint_task"
    assert code_of(folders("encoder"), Task.GENERATE) == "checkpoint_task"
    assert code_of(folders("classifier"), Task.EMBED) == "checkpoint_task"


def test_nearest_model_type_is_named(tmp_path: Path) -> None:
    """A slip in the model type is answered with the type it is nearest to."""
    folder = models.placeholder(tmp_path, model_type="lama", architectures=["LamaForCausalLM"])
    with pytest.raises(UserError, match='Did you mean "llama"'):
        inspect(str(folder))


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", Task.GENERATE),
        ("GPT2LMHeadModel", Task.GENERATE),
        ("Qwen2ForCausalLM", Task.GENERATE),
        ("BertModel", Task.EMBED),
        ("BertForMaskedLM", Task.EMBED),
        ("XLMRobertaModel", Task.EMBED),
        ("BertForSequenceClassification", Task.CLASSIFY),
        ("LlamaForSequenceClassification", Task.CLASSIFY),
    ],
)
def test_tables_of_the_installed_transformers_are_read(architecture: str, task: Task) -> None:
    """A canary: transformers' own tables, read as text, still have the form we read."""
    assert task_of((architecture,), "", Path()) is task


def test_inspecting_imports_no_heavy_library(tmp_path: Path) -> None:
    """Judging a folder loads neither torch nor transformers."""
    folder = models.placeholder(tmp_path / "model")
    program = (
        "import sys; from runtime.checkpoints.inspect import inspect; inspect(sys.argv[1]);"
        "assert not {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=60, cwd=root)


def test_what_the_library_refuses_is_one_short_error(tmp_path: Path) -> None:
    """A folder that only the library finds wrong fails in one message with a hint, not in a traceback."""
    with pytest.raises(DeployError) as raised:
        load(ModelSpec("m", "transformers", str(models.placeholder(tmp_path))))
    assert raised.value.code == "model_not_loaded"
    assert len(str(raised.value).splitlines()) == 2


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    """A checkpoint that lacks some weights is refused: they would be random numbers."""
    from safetensors.torch import load_file, save_file

    folder = models.language_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeployError, match="up_proj") as raised:
        load(ModelSpec("m", "transformers", str(folder)))
    assert raised.value.code == "weights_missing"


@pytest.mark.parametrize(
    ("word", "task"),
    [
        ("custom/auto", None),
        ("auto", None),
        ("custom/llama2", Task.GENERATE),
        ("LLAMA", Task.GENERATE),
        ("chatglm6b", Task.GENERATE),
        ("custom/alpha_moss", Task.GENERATE),
        ("custom/starcode", Task.GENERATE),
        ("custom/m3e", Task.EMBED),
        ("custom/qwen_vl_chat", Task.GENERATE),
        ("custom/bge_rerank", Task.RANK),
        ("custom/stable_diffusion", Task.DRAW),
        ("whisper", Task.TRANSCRIBE),
        ("bark", Task.SPEAK),
    ],
)
def test_old_names_of_model_kinds(word: str, task: Task | None) -> None:
    """Byzer's words still say what a model is for."""
    assert pretrained_model_type(word) == ModelType(task)


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [
        ("saas/azure_openai", "model_type_unavailable", "provider"),
        ("custom/lama2", "model_type_unknown", 'Did you mean "custom/llama2"'),
        ("saas/qianfun", "model_type_unknown", 'Did you mean "saas/qianfan"'),
        ("custum/bge", "model_type_unknown", 'Did you mean "custom/bge"'),
        ("sfft/llama2", "model_type_training", "custom/auto"),
        ("", "model_type_unknown", "custom/auto"),
    ],
)
def test_words_that_name_no_deployable_kind(word: str, code: str, says: str) -> None:
    """What cannot be deployed yet says so, and a slip is answered with the nearest word."""
    with pytest.raises(UserError) as raised:
        pretrained_model_type(word)
    assert raised.value.code == code
    assert says in str(raised.value)
