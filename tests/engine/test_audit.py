"""The fingerprint of a model folder follows what makes the model answer as it does, and nothing else."""

from minicai.engine.audit import models_record, weights_sha256


def folder(path, **files):
    path.mkdir()
    for name, content in {
        "config.json": "{}",
        "model.safetensors": "12",
        "tokenizer.json": "t",
        "stage.json": "today",
    }.items():
        (path / name).write_text(files.get(name.split(".")[0], content))
    return path


def test_the_fingerprint_follows_config_weights_and_tokenizer_alone(tmp_path):
    one, same = folder(tmp_path / "one"), folder(tmp_path / "same", stage="tomorrow")
    others = [
        folder(tmp_path / name, **{name: "other"}) for name in ("config", "model", "tokenizer")
    ]
    assert weights_sha256(one) == weights_sha256(same)
    assert len({weights_sha256(path) for path in (one, *others)}) == 4
    (one / "model.safetensors").rename(one / "other.safetensors")
    assert weights_sha256(one) != weights_sha256(same)


def test_each_model_is_recorded_once_by_its_folder(tmp_path):
    one = str(folder(tmp_path / "one"))
    assert models_record((one, "", one)) == {one: weights_sha256(one)}
