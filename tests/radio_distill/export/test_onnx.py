"""What onnxruntime computes from the file is the student, at any batch and size."""

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from radio_distill.errors import UnknownNameError
from radio_distill.export.onnx import Onnx
from radio_distill.export.write import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@torch.no_grad()
def _expected(student, pixels):
    """Outputs by name, put together from the student by hand: clip, sam, dino have slots 0 to 2."""
    tokens, spatial = student.model.student(pixels)
    predictions = student.model(pixels, ("clip", "sam", "dino")).features
    outputs = {"summary": torch.cat((tokens[:, 0], tokens[:, 2]), dim=1), "features": spatial}
    for name, (summary, features) in predictions.items():
        if summary is not None:
            outputs[f"{name}_summary"] = summary
        outputs[f"{name}_features"] = features
    return outputs


def _check_outputs(student, path, pixels):
    """Compare all outputs of a file with the student's; returns their names."""
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    expected = _expected(student, pixels)
    for name, found in zip(names, session.run(None, {"pixels": pixels.numpy()}), strict=True):
        assert found.shape == tuple(expected[name].shape)
        assert np.abs(found - expected[name].numpy()).max() <= 1e-4, (name, pixels.shape)
    return names


HEADS = {
    "clip": {"features": {"name": "mlp", "options": {"upsample": 2}}},
    "sam": {"features": {"name": "ladder", "options": {"blocks": [1]}}},
    "dino": {
        "summary": {"name": "shared"},
        "features": {"name": "attention", "options": {"heads": 2, "blocks": 1}},
    },
}


def test_export__every_batch_and_size(make_student, tmp_path):
    """Of two blocks, since the time of an export grows with their number: windows, then global."""
    student = make_student(
        size=(32, 64), spectral_reparametrization=True, heads=HEADS, window_size=2, global_blocks=2
    )
    body = student.model.student
    body.blocks, body.depth, body.global_blocks = body.blocks[:2], 2, (1,)
    path = export(student, tmp_path / "out", Onnx(("dino", "sam", "clip")))
    assert path == tmp_path / "out" / "model.onnx"
    for shape in ((1, 224, 224), (3, 224, 192), (2, 160, 320), (1, 32, 32), (1, 768, 512)):
        names = _check_outputs(student, path, torch.rand(shape[0], 3, *shape[1:]))
    heads = ["dino_summary", "dino_features", "sam_features"]  # SAM has no summary
    assert names == ["summary", "features", *heads, "clip_summary", "clip_features"]

    _check_metadata(path)
    _check_example(student, path)


def _check_metadata(path):
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    sides = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 3, "height", "width"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["recipe"] == "tiny"
    assert (metadata["patch_size"], metadata["size_step"]) == ("16", "32")
    licences = json.loads(metadata["licences"])
    assert list(licences) == json.loads(metadata["teachers"]) == ["clip", "sam", "dino"]
    assert licences["sam"] == "apache-2.0"


def _check_example(student, path):
    """Run the example of the model card."""
    card = (path.parent / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert example
    names: dict[str, Any] = {}
    exec(example[1].replace("FOLDER", str(path.parent)), names)
    expected = _expected(student, torch.from_numpy(names["pixels"]))
    for name, found in names["outputs"].items():
        assert np.abs(found - expected[name].numpy()).max() <= 1e-4


def test_export__unknown_head(make_student, tmp_path):
    with pytest.raises(UnknownNameError, match=r"'dini'.*'dino'"):
        export(make_student(), tmp_path / "out", Onnx(("dini",)))
    assert not (tmp_path / "out").exists()


def test_usage__students_of_teachers_without_summary_have_features_alone(make_student):
    student = make_student(teachers=("sam",))
    assert 'zip(["features"],' in Onnx().usage(student)
