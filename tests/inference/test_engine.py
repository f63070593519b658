import os
import subprocess
import sys

import numpy as np
import pytest

from inference.engine import Engine
from inference.images import frame_cell
from model_zoo import load_checkpoint


@pytest.fixture(scope="module")
def cells(draw_cell, tiny_engine):
    return np.stack([frame_cell(draw_cell(i, axes=(100 + 10 * i, 150)), tiny_engine.card.framing) for i in range(9)])


def test_predict_gives_probabilities_and_embeddings(tiny_engine, cells):
    p_all, embedding = tiny_engine.predict(cells)
    assert p_all.shape == (9,) and p_all.dtype == np.float32 and ((p_all > 0) & (p_all < 1)).all()
    assert embedding.shape == (9, 1280) and embedding.dtype == np.float32 and np.isfinite(embedding).all()
    assert len(set(p_all)) == 9 and {True, False} == set(p_all > 0.5)


def test_a_cell_scores_the_same_alone_and_in_a_batch(tiny_engine, cells):
    together = tiny_engine.predict(cells)[0]
    assert [tiny_engine.predict(cell[None])[0][0] for cell in cells] == together.tolist()


def test_no_cells_give_no_figures(tiny_engine, cells):
    p_all, embedding = tiny_engine.predict(cells[:0])
    assert p_all.shape == (0,) and embedding.shape == (0, 1280)


def test_probabilities_are_keras_own(tiny_checkpoint, tiny_engine, cells):
    import keras

    checkpoint = load_checkpoint(tiny_checkpoint)
    model = checkpoint.keras_model()
    logit = keras.Model(model.inputs[0], model.get_layer("logit").output)(cells.astype("float32"))
    expected = 1 / (1 + np.exp(-keras.ops.convert_to_numpy(logit)[:, 0] / checkpoint.card.temperature))
    np.testing.assert_allclose(tiny_engine.predict(cells)[0], expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_calibration_is_the_sigmoid_of_the_scaled_logit(temperature, tiny_checkpoint, make_card):
    checkpoint = load_checkpoint(tiny_checkpoint)
    engine = Engine(type(checkpoint)(path=checkpoint.path, card=make_card(temperature=temperature)))
    logit = np.float32([-1e4, -2, 0, 2, 1e4])
    p_all = engine.calibrate(logit)
    assert p_all.dtype == np.float32 and p_all[2] == 0.5 and (np.diff(p_all) > 0).all()
    assert p_all[3] == pytest.approx(1 / (1 + np.exp(-2 / temperature)))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 96, 96, 3), "float32"),
        np.zeros((1, 96, 96, 3), "int64"),
        np.zeros((1, 95, 96, 3), "uint8"),
        np.zeros((1, 96, 96, 4), "uint8"),
        np.zeros((96, 96, 3), "uint8"),
        np.zeros((0,), "uint8"),
    ],
)
def test_another_type_or_shape_is_told(wrong, tiny_engine):
    with pytest.raises(ValueError, match="Received"):
        tiny_engine.predict(wrong)


def test_the_runtime_reports_to_nobody(tiny_checkpoint, repository, tmp_path):
    """onnxruntime's usage reporting leaves a `.ses` file in the temporary folder when it is on."""
    load = f"Engine(load_checkpoint({str(tiny_checkpoint)!r}))"
    script = f"from model_zoo import load_checkpoint; from inference.engine import Engine; {load}"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=repository, env=environment, check=True)
    assert not list(tmp_path.rglob("*.ses")) and not (tmp_path / ".ses").exists()
