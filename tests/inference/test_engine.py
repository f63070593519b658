import os
import subprocess
import sys

import numpy as np
import pytest

from inference.engine import Engine
from inference.images import decode_image, frame_cell, rotate_cells
from model_zoo import find_checkpoint, load_checkpoint


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


@pytest.mark.parametrize("name", ["efficientnet_b3_pooled", "mobilenet_v2_pyramid"])
def test_a_jpeg_is_called_as_the_cell_it_was_made_from(name, real_cells, encode):
    """Its traces on the background, taken for cell, turned nearly all ALL cells into HEM."""
    engine = Engine(find_checkpoint(name))
    found = []
    for file in real_cells(10):
        cell, _ = decode_image(file.read_bytes(), name=file.name)
        jpeg, _ = decode_image(encode(cell, "JPEG", quality=95), name="cell.jpg")
        found.append(engine.predict(np.stack([frame_cell(x, engine.card.framing) for x in (cell, jpeg)]))[0])
    before, after = np.transpose(found)
    assert np.abs(after - before).mean() < 0.04 and np.abs(after - before).max() < 0.2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_calibration_is_the_sigmoid_of_the_scaled_logit(temperature, tiny_checkpoint, make_card):
    checkpoint = load_checkpoint(tiny_checkpoint)
    engine = Engine(type(checkpoint)(path=checkpoint.path, card=make_card(temperature=temperature)))
    logit = np.float32([-1e4, -2, 0, 2, 1e4])
    p_all = engine.calibrate(logit)
    assert p_all.dtype == np.float32 and p_all[2] == 0.5 and (np.diff(p_all) > 0).all()
    assert p_all[3] == pytest.approx(1 / (1 + np.exp(-2 / temperature)))


def test_rotations_average_the_logit_before_it_is_calibrated(tiny_engine, cells):
    p_all, embedding = tiny_engine.over(8).predict(cells)
    views = [tiny_engine.predict(rotate_cells(cells, turns)) for turns in range(8)]
    logit = np.mean([np.log(p / (1 - p)) for p in np.float64([p for p, _ in views])], axis=0)
    np.testing.assert_allclose(p_all, 1 / (1 + np.exp(-logit)), atol=1e-5)
    np.testing.assert_allclose(embedding, np.mean([e for _, e in views], axis=0), atol=1e-5)
    assert p_all.dtype == embedding.dtype == np.float32
    assert tiny_engine.over(8).predict(cells[:0])[1].shape == (0, 1280)


def test_averaged_answer_does_not_depend_on_how_the_cell_lies(tiny_engine, cells):
    def spread(engine):
        return np.ptp([engine.predict(rotate_cells(cells, turns))[0] for turns in (0, 2, 4, 6)], axis=0)

    # not exact: a few pixels of the 45-degree views round the other way
    assert spread(tiny_engine.over(8)).max() < 0.02 and spread(tiny_engine).min() > 0.1


def test_engine_averages_as_its_card_was_measured_unless_told(tiny_checkpoint, tiny_engine, make_card, cells):
    checkpoint = load_checkpoint(tiny_checkpoint)
    measured = type(checkpoint)(path=checkpoint.path, card=make_card(rotations=8))
    assert (Engine(checkpoint).rotations, Engine(measured).rotations, Engine(measured, rotations=1).rotations) == (1, 8, 1)
    assert tiny_engine.remark == tiny_engine.over(1).remark == Engine(measured).remark == ""
    assert "averaged over 8 rotations; the figures on the network's card were measured without" in tiny_engine.over(8).remark
    assert "without rotations; the figures on the network's card were measured averaged" in Engine(measured, rotations=1).remark
    upright = tiny_engine.over(8).over(1).predict(cells)[0]
    assert upright.tolist() == tiny_engine.predict(cells)[0].tolist() != tiny_engine.over(8).predict(cells)[0].tolist()


@pytest.mark.parametrize("rotations", [0, 3, -8])
def test_other_numbers_of_rotations_are_told(rotations, tiny_checkpoint, tiny_engine):
    with pytest.raises(ValueError, match=f"Received: {rotations}"):
        tiny_engine.over(rotations)
    with pytest.raises(ValueError, match=f"Received: {rotations}"):
        Engine(load_checkpoint(tiny_checkpoint), rotations=rotations)


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
