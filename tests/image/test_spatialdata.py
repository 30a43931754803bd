"""SpatialData: taken apart into a slide, and made of one."""

import sys
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from seq2expr.errors import UserError
from seq2expr.image.spatialdata import from_spatialdata, to_spatialdata


class Centroids:
    def __init__(self, xy):
        self.centroid = SimpleNamespace(x=xy[:, 0], y=xy[:, 1])


class Shapes:
    """What the adapter uses of a GeoDataFrame of circles."""

    def __init__(self, index, xy):
        self.index, self.xy = pd.Index(index), np.asarray(xy, float)
        self.loc = self

    def __getitem__(self, names):
        rows = self.index.get_indexer(names)
        return SimpleNamespace(geometry=Centroids(self.xy[rows]))


@pytest.fixture
def data():
    """A hexagonal slide, 40 px apart; the shapes in another order, one of them missing."""
    places = [(row, column) for row in range(5) for column in range(row % 2, 10, 2)]
    row, column = np.array(places).T
    names = [f"spot{i}" for i in range(len(places))]
    values = np.random.default_rng(0).poisson(2, (len(places), 3)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "in_tissue": 1,
            "array_row": row,
            "array_col": column,
            "spot_id": np.arange(len(places)),
            "region": "s",
        },
        index=names,
    )
    table = anndata.AnnData(values, obs=obs, var=pd.DataFrame(index=["a", "b", "c"]))
    table.uns["spatialdata_attrs"] = {
        "region": "s",
        "region_key": "region",
        "instance_key": "spot_id",
    }
    xy = np.column_stack([20 + column * 20, 30 + row * 20 * np.sqrt(3)])
    order = np.random.default_rng(1).permutation(len(places))[:-1]
    shapes = Shapes(order, xy[order])
    lost = (set(range(len(places))) - set(order)).pop()
    return SimpleNamespace(tables={"table": table}, shapes={"s": shapes}), xy, lost


def test_takes_a_slide_by_its_instances(data):
    stored, xy, lost = data
    slide = from_spatialdata(stored, "one", patient="P")
    kept = np.delete(np.arange(len(xy)), lost)
    assert slide.obs_names.tolist() == [f"spot{i}" for i in kept]
    np.testing.assert_allclose(slide.obsm["spatial"], xy[kept])
    np.testing.assert_array_equal(slide.X.toarray(), stored.tables["table"].X[kept])
    told = slide.uns["seq2expr"]
    assert told["left_out"] == {"counts without a shape": 1}
    assert told["mpp"] == pytest.approx(2.5)
    assert (slide.obs["patient_id"] == "P").all()


def test_what_cannot_be_taken(data):
    stored = data[0]
    with pytest.raises(UserError, match="no table 'x'; it has table"):
        from_spatialdata(stored, "one", table="x")
    attributes = stored.tables["table"].uns["spatialdata_attrs"]
    attributes["region"] = ["s", "t"]
    with pytest.raises(UserError, match="annotates s, t; it must annotate one element of shapes"):
        from_spatialdata(stored, "one")
    attributes["region"] = "labels"
    with pytest.raises(UserError, match="annotates labels"):
        from_spatialdata(stored, "one")


def test_without_the_extra(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "spatialdata", None)
    slide = from_spatialdata(data[0], "one")
    with pytest.raises(UserError, match=r"pip install 'seq2expr\[spatialdata\]'"):
        to_spatialdata(slide)
    with pytest.raises(UserError, match="SpatialData is not installed"):
        from_spatialdata(data[0], "one", coordinate_system="global")


@pytest.mark.filterwarnings("ignore")  # of the libraries that it brings
def test_there_and_back(data):
    pytest.importorskip("spatialdata", reason="the extra [spatialdata] is not installed")
    slide = from_spatialdata(data[0], "one")
    stored = to_spatialdata(slide)
    again = from_spatialdata(stored, "one", coordinate_system="global")
    assert again.obs_names.tolist() == slide.obs_names.tolist()
    np.testing.assert_allclose(again.obsm["spatial"], slide.obsm["spatial"])
    np.testing.assert_array_equal(again.X.toarray(), slide.X.toarray())
