"""Readers: every format becomes the same AnnData, and says what it left out."""

import gzip
import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import io, sparse

from seq2expr.errors import UserError
from seq2expr.image.legacy import read_labels
from seq2expr.image.spots import read_positions, read_spots

GENES = ["ENSG00000000003.14", "TSPAN6", "FO538757.1"]


@pytest.fixture
def blank(tmp_path):
    """An image of 400 x 300 px without a scale."""
    path = tmp_path / "he.png"
    Image.new("RGB", (400, 300), "white").save(path)
    return path


def square(side: int = 5, step: float = 40.0) -> pd.DataFrame:
    """A spot file of side x side spots, one step apart, x first."""
    rows = [
        {"x": x, "y": y, "pixel_x": 20 + step * x, "pixel_y": 10 + step * y, "selected": 1}
        for x in range(side)
        for y in range(side)
    ]
    return pd.DataFrame(rows)


def count_table(names, genes=GENES, *, seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).poisson(2.0, (len(names), len(genes)))
    return pd.DataFrame(values, index=list(names), columns=genes)


@pytest.fixture
def legacy(tmp_path, blank):
    """A slide of legacy ST: its files and tables; write() writes them."""

    class Legacy:
        def __init__(self):
            self.spots = square()
            self.counts = count_table([f"{x}x{y}" for x, y in self.spots[["x", "y"]].to_numpy()])
            self.files = {
                "image": blank,
                "counts": tmp_path / "s.tsv.gz",
                "spots": tmp_path / "s_selection.tsv",
            }

        def read(self, **options):
            self.counts.to_csv(self.files["counts"], sep="\t")
            self.spots.to_csv(self.files["spots"], sep="\t", index=False)
            return read_spots("s", **self.files, **options)

    return Legacy()


def test_legacy_joins_by_name_in_the_order_of_the_counts(legacy):
    legacy.counts = legacy.counts.sample(frac=1, random_state=1)
    slide = legacy.read(patient="P")
    assert slide.obs_names.tolist() == legacy.counts.index.tolist()
    assert slide.X.dtype == np.float32
    assert isinstance(slide.X, sparse.csr_matrix)
    np.testing.assert_array_equal(slide.X.toarray(), legacy.counts.to_numpy())
    for name, row, (x, y) in zip(
        slide.obs_names, slide.obs.itertuples(), slide.obsm["spatial"], strict=True
    ):
        column, line = map(int, name.split("x"))
        assert (row.array_col, row.array_row) == (column, line)
        assert (x, y) == (20 + 40 * column, 10 + 40 * line)
        assert (row.slide_id, row.patient_id, row.in_tissue) == ("s", "P", True)
    assert slide.obsm["spatial"].dtype == np.float64
    told = slide.uns["seq2expr"]
    assert told["mpp"] == pytest.approx(200 / 40)
    assert told["pitch_um"] == 200
    assert (told["layout"], told["raw"], told["left_out"]) == ("square", True, {})
    assert told["mpp_source"] == "pitch of the spots"
    library = slide.uns["spatial"]["s"]
    assert library["images"] == {}
    assert library["metadata"] == {"source_image_path": str(legacy.files["image"])}
    assert library["scalefactors"]["spot_diameter_fullres"] == pytest.approx(20)


def test_names_of_genes(legacy):
    slide = legacy.read()
    assert slide.var_names.tolist() == ["ENSG00000000003", "TSPAN6", "FO538757.1"]
    assert slide.var["gene_name"].tolist() == ["", "TSPAN6", "FO538757.1"]


def test_genes_met_again_are_summed(legacy):
    genes = ["ENSG00000000003.14", "A", "ENSG00000000003.15", "A", "B"]
    legacy.counts = count_table(legacy.counts.index, genes)
    slide = legacy.read()
    assert slide.var_names.tolist() == ["ENSG00000000003", "A", "B"]
    values = legacy.counts.to_numpy()
    expected = np.column_stack(
        [values[:, 0] + values[:, 2], values[:, 1] + values[:, 3], values[:, 4]]
    )
    np.testing.assert_array_equal(slide.X.toarray(), expected)
    told = slide.uns["seq2expr"]["left_out"]
    assert told == {"gene id met again (summed into the first)": 2}


def test_whatever_is_left_out_is_counted_by_reason(legacy):
    spots, counts = legacy.spots, legacy.counts
    spots.loc[0, "selected"] = 0  # 0x0
    spots.loc[1, "pixel_x"] = np.nan  # 0x1
    legacy.spots = pd.concat([spots, spots.iloc[[5]]])  # 1x0 again
    again = pd.concat([counts.drop("2x2"), counts.iloc[[7]]])
    legacy.counts = pd.concat([again, count_table(["30x30"])])
    slide = legacy.read()
    assert slide.uns["seq2expr"]["left_out"] == {
        "not selected": 1,
        "spot without a pixel position": 1,
        "spot id met again in the positions": 1,
        "spot id met again in the counts": 1,
        "counts without a position": 2,  # 0x1 and 30x30
        "position without counts": 1,
    }
    assert slide.n_obs == 22
    everything = legacy.read(all_spots=True)
    assert everything.n_obs == 23
    assert everything.obs.loc["0x0", "in_tissue"] == np.False_


def test_the_file_written_is_read_again_the_same(legacy, tmp_path):
    slide = legacy.read(patient="P", mpp=5.0)
    slide.write_h5ad(tmp_path / "s.h5ad")
    again = read_spots("s", image=legacy.files["image"], h5ad=tmp_path / "s.h5ad", mpp=5.0)
    pd.testing.assert_frame_equal(again.obs, slide.obs, check_categorical=False, check_dtype=False)
    np.testing.assert_array_equal(again.X.toarray(), slide.X.toarray())
    np.testing.assert_array_equal(again.obsm["spatial"], slide.obsm["spatial"])
    pd.testing.assert_frame_equal(again.var, slide.var)
    assert again.uns["seq2expr"]["layout"] == "square"
    assert again.uns["seq2expr"]["pitch_um"] == pytest.approx(200)


def test_a_shrunken_image_needs_its_scale(legacy, blank):
    spots = legacy.spots
    spots[["pixel_x", "pixel_y"]] *= 4
    with pytest.raises(UserError, match=r"21 of 25 spots lie outside .*he.png \(400 x 300 px\)"):
        legacy.read()
    slide = legacy.read(spot_scale=0.25)
    assert slide.obsm["spatial"].max(0).tolist() == [180, 170]
    assert slide.uns["seq2expr"]["mpp"] == pytest.approx(5.0)
    with pytest.raises(UserError, match="spot_scale = 0"):
        legacy.read(spot_scale=0)


def test_the_scale_is_not_guessed(legacy):
    with pytest.raises(
        UserError, match=r"4 um per pixel \(declared\) and 5 \(pitch of the spots\)"
    ):
        legacy.read(mpp=4.0)
    legacy.spots["y"] = 2 * legacy.spots["y"] + legacy.spots["x"] % 2  # staggered: no known pitch
    legacy.counts.index = [f"{x}x{y}" for x, y in legacy.spots[["x", "y"]].to_numpy()]
    legacy.spots["pixel_y"] = 10 + 20.0 * legacy.spots["y"]
    with pytest.raises(UserError, match="image without a scale"):
        legacy.read()
    slide = legacy.read(mpp=4.36)
    told = slide.uns["seq2expr"]
    assert (told["mpp"], told["mpp_source"], told["layout"]) == (4.36, "declared", "staggered")
    assert told["pitch_um"] == pytest.approx(4.36 * np.hypot(40, 20))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (-1, r"-1 for gene TSPAN6 in spot '1x0', which is no count"),
        (1.5, r"1.5 for gene TSPAN6"),
        ("many", r"'many' is no count"),
        ("", r"line of spot '1x0' lacks values"),
    ],
)
def test_what_is_no_count_is_named(legacy, cell, message):
    legacy.counts = legacy.counts.astype(object)
    legacy.counts.iloc[5, 1] = cell
    with pytest.raises(UserError, match=message):
        legacy.read()
    if not isinstance(cell, str):
        slide = legacy.read(raw=False)
        assert slide.X.toarray()[5, 1] == cell
        assert slide.uns["seq2expr"]["raw"] is False


def test_wrong_legacy_files(legacy, tmp_path):
    legacy.read()
    files = legacy.files
    content = files["counts"].read_bytes()
    files["counts"].write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="Cannot read the counts"):
        read_spots("s", **files)
    files["counts"].write_bytes(gzip.compress(b"\tA\tB\nENSG1\t1\t2\n"))
    with pytest.raises(UserError, match=r"'ENSG1' is no name of a spot; .*must be transposed"):
        read_spots("s", **files)
    files["counts"].write_bytes(gzip.compress(b"spot\tA\n1x1\t1\t2\n"))
    with pytest.raises(UserError, match="1 genes are named but the lines have 2 values"):
        read_spots("s", **files)
    files["counts"].write_bytes(gzip.compress(b"\tA\tB\n77x1\t1\t2\n"))
    with pytest.raises(UserError, match=r"Names there are like '77x1', .* like '0x0'"):
        read_spots("s", **files)
    files["counts"].unlink()
    with pytest.raises(UserError, match=r"Cannot read .*No such file"):
        read_spots("s", **files)


def test_exactly_one_source(tmp_path, blank):
    with pytest.raises(UserError, match="has no counts; give exactly one of counts, space_ranger"):
        read_spots("s", image=blank)
    with pytest.raises(UserError, match="has counts and h5ad counts"):
        read_spots("s", image=blank, counts="a", spots="b", h5ad="c")
    with pytest.raises(UserError, match="counts and spots belong together"):
        read_spots("s", image=blank, counts="a")
    with pytest.raises(UserError, match="counts and spots belong together; h5ad is given with"):
        read_spots("s", image=blank, h5ad="a", spots="b")


# --- Space Ranger -----------------------------------------------------------------------------


def visium(side: int = 6, pitch: float = 40.0) -> pd.DataFrame:
    """Positions as Space Ranger writes them: the pixel row first."""
    rows = []
    for row in range(side):
        for column in range(row % 2, 2 * side, 2):
            place = {"pxl_row_in_fullres": 30 + row * pitch * np.sqrt(3) / 2}
            place["pxl_col_in_fullres"] = 20 + column * pitch / 2
            name = {"barcode": f"B{row}-{column}-1", "in_tissue": int(column > 1)}
            rows.append({**name, "array_row": row, "array_col": column, **place})
    return pd.DataFrame(rows)


def write_h5(path, counts: pd.DataFrame, features: pd.DataFrame):
    matrix = sparse.csc_matrix(counts.to_numpy().T)  # features x barcodes
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array(counts.index, dtype="S")
        for name, column in features.items():
            group[f"features/{name}"] = np.array(column, dtype="S")


def write_mtx(folder, counts: pd.DataFrame, features: pd.DataFrame):
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as handle:
        io.mmwrite(handle, sparse.coo_matrix(counts.to_numpy().T))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(counts.index).encode()))
    text = features.to_csv(sep="\t", header=False, index=False)
    (folder / "features.tsv.gz").write_bytes(gzip.compress(text.encode()))


FEATURES = pd.DataFrame(
    {
        "id": ["ENSG00000000003", "ENSG00000000005", "CD3"],
        "name": ["TSPAN6", "TNMD", "CD3"],
        "feature_type": ["Gene Expression", "Gene Expression", "Antibody Capture"],
    }
)


def write_ranger(root, *, version: int, matrix: str = "filtered_feature_bc_matrix.h5"):
    """A folder of Space Ranger with spots 100 um and 40 px apart, i.e. 2.5 um/px."""
    (root / "spatial").mkdir(parents=True)
    table = visium()
    name = {1: "tissue_positions_list.csv", 2: "tissue_positions.csv"}[version]
    table.to_csv(root / "spatial" / name, header=version == 2, index=False)
    factors = {"spot_diameter_fullres": 65 / 2.5, "tissue_hires_scalef": 0.5}
    (root / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    inside = table["barcode"][table["in_tissue"] == 1]
    wanted = table["barcode"] if matrix.startswith("raw") else inside
    counts = count_table(wanted, FEATURES["id"])
    if matrix.endswith(".h5"):
        write_h5(root / matrix, counts, FEATURES)
    else:
        write_mtx(root / matrix, counts, FEATURES)
    return table, counts


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "matrix",
    ["filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "raw_feature_bc_matrix"],
)
def test_space_ranger(tmp_path, blank, version, matrix):
    table, counts = write_ranger(tmp_path / "run" / "outs", version=version, matrix=matrix)
    slide = read_spots("v", image=blank, space_ranger=tmp_path / "run", patient="P")
    inside = table[table["in_tissue"] == 1].set_index("barcode")
    assert slide.obs_names.tolist() == inside.index.tolist()
    np.testing.assert_allclose(
        slide.obsm["spatial"], inside[["pxl_col_in_fullres", "pxl_row_in_fullres"]], rtol=1e-12
    )
    np.testing.assert_array_equal(slide.obs["array_row"], inside["array_row"])
    np.testing.assert_array_equal(slide.obs["array_col"], inside["array_col"])
    np.testing.assert_array_equal(slide.X.toarray(), counts.loc[inside.index].iloc[:, :2])
    assert slide.var_names.tolist() == ["ENSG00000000003", "ENSG00000000005"]
    assert slide.var["gene_name"].tolist() == ["TSPAN6", "TNMD"]
    told = slide.uns["seq2expr"]
    assert told["mpp"] == pytest.approx(2.5)
    assert (told["layout"], told["pitch_um"]) == ("hex", 100)
    left_out = {"feature is no gene (Antibody Capture)": 1}
    if matrix.startswith("raw"):
        left_out["not selected"] = 6
        everything = read_spots("v", space_ranger=tmp_path / "run", all_spots=True)
        assert everything.n_obs == len(table)
        assert everything.obs["in_tissue"].sum() == len(inside)
    assert told["left_out"] == left_out
    assert slide.uns["spatial"]["v"]["scalefactors"]["spot_diameter_fullres"] == 26


def test_the_small_pictures_are_refused_as_the_image(tmp_path):
    root = tmp_path / "outs"
    write_ranger(root, version=2)
    picture = root / "spatial" / "tissue_hires_image.png"
    Image.new("RGB", (200, 150)).save(picture)
    with pytest.raises(
        UserError, match=r"is the hires picture; .* about 400 px wide.*spot_scale: 0.5"
    ):
        read_spots("v", image=picture, space_ranger=root)
    low = read_spots("v", image=picture, space_ranger=root, spot_scale=0.5)
    assert low.uns["seq2expr"]["mpp"] == pytest.approx(5.0)
    factors = low.uns["spatial"]["v"]["scalefactors"]
    assert factors == {"spot_diameter_fullres": 13, "tissue_hires_scalef": 1}


def test_broken_folders(tmp_path):
    root = tmp_path / "outs"
    write_ranger(root, version=2)
    (root / "spatial" / "scalefactors_json.json").write_text("{")
    with pytest.raises(UserError, match=r"Cannot read .*scalefactors_json.json"):
        read_spots("v", space_ranger=root)
    (root / "spatial" / "scalefactors_json.json").unlink()
    matrix = root / "filtered_feature_bc_matrix.h5"
    matrix.write_bytes(matrix.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"Cannot read the counts .*may be damaged"):
        read_spots("v", space_ranger=root)
    matrix.unlink()
    with pytest.raises(UserError, match="positions but no counts"):
        read_spots("v", space_ranger=root)
    with pytest.raises(UserError, match="is no folder of Space Ranger"):
        read_spots("v", space_ranger=tmp_path / "nowhere")


def test_visium_hd_bins(tmp_path, blank):
    for side in (8, 16):
        root = tmp_path / "outs" / "binned_outputs" / f"square_{side:03}um"
        (root / "spatial").mkdir(parents=True)
        px = side / 0.5  # 0.5 um per pixel
        rows = [
            {
                "barcode": f"s_{side:03}um_{row:05}_{column:05}-1",
                "in_tissue": int(row > 0),
                "array_row": row,
                "array_col": column,
                "pxl_row_in_fullres": (row + 0.5) * px,
                "pxl_col_in_fullres": (column + 0.5) * px,
            }
            for row in range(6)
            for column in range(10)
        ]
        table = pd.DataFrame(rows)
        table.to_parquet(root / "spatial" / "tissue_positions.parquet")
        factors = {"spot_diameter_fullres": px, "bin_size_um": side, "microns_per_pixel": 0.5}
        (root / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
        inside = table["barcode"][table["in_tissue"] == 1]
        write_h5(
            root / "filtered_feature_bc_matrix.h5", count_table(inside, FEATURES["id"]), FEATURES
        )
    slide = read_spots("hd", image=blank, space_ranger=tmp_path / "outs", bin_um=16)
    assert slide.n_obs == 50
    assert slide.obs_names[0] == "s_016um_00001_00000-1"
    assert slide.obsm["spatial"][0].tolist() == [16, 48]
    told = slide.uns["seq2expr"]
    assert (told["mpp"], told["mpp_source"]) == (0.5, "scale factors")
    assert (told["layout"], told["pitch_um"]) == ("square", 16)
    assert slide.uns["spatial"]["hd"]["scalefactors"] == {"spot_diameter_fullres": 32}
    for wrong, shown in ((None, "not given"), (2, "2")):
        with pytest.raises(UserError, match=f"bins of 8, 16 um; bin_um is {shown}"):
            read_spots("hd", image=blank, space_ranger=tmp_path / "outs", bin_um=wrong)
    one = tmp_path / "outs" / "binned_outputs" / "square_008um"
    assert read_spots("hd", space_ranger=one).uns["seq2expr"]["pitch_um"] == 8
    with pytest.raises(
        UserError, match=r"0.5 um per pixel \(scale factors\) and 0.6 \(declared\)"
    ):
        read_spots("hd", space_ranger=one, mpp=0.6)


# --- AnnData ----------------------------------------------------------------------------------


def annotated(n_slides: int = 1) -> anndata.AnnData:
    """Visium as scanpy keeps it: symbols as names, Ensembl ids beside them."""
    table = pd.concat([visium()] * n_slides, ignore_index=True)
    table.index = [f"{name}-{row}" for row, name in enumerate(table["barcode"])]
    counts = count_table(table.index, ["a", "b", "c"]).to_numpy()
    data = anndata.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=table[["in_tissue", "array_row", "array_col"]],
        var=pd.DataFrame({"gene_ids": ["ENSG1", "ENSG2", "ENSG3"]}, index=["a", "b", "c"]),
        obsm={"spatial": table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()},
    )
    data.uns["spatial"] = {"lib": {"scalefactors": {"spot_diameter_fullres": 26.0}, "images": {}}}
    return data


def test_h5ad(tmp_path, blank):
    data = annotated()
    data.obs["patient_id"] = "P7"
    data.obs["class"] = [f"c{row}" for row in range(len(data))]
    data.write_h5ad(tmp_path / "a.h5ad")
    slide = read_spots("a", image=blank, h5ad=tmp_path / "a.h5ad")
    inside = data.obs["in_tissue"].to_numpy() == 1
    assert slide.obs["class"].tolist() == data.obs["class"][inside].tolist()
    np.testing.assert_array_equal(slide.X.toarray(), data.X.toarray()[inside])
    assert slide.var_names.tolist() == ["ENSG1", "ENSG2", "ENSG3"]
    assert slide.var["gene_name"].tolist() == ["a", "b", "c"]
    assert (slide.obs["patient_id"] == "P7").all()
    assert slide.uns["seq2expr"]["mpp"] == pytest.approx(2.5)
    assert slide.uns["spatial"]["a"]["scalefactors"] == {"spot_diameter_fullres": 26}
    renamed = read_spots("a", h5ad=tmp_path / "a.h5ad", patient="")
    assert (renamed.obs["patient_id"] == "").all()


def test_h5ad_of_logged_values(tmp_path):
    data = annotated()
    counts = data.X.copy()
    data.X = data.X.log1p()
    data.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=r"0.693147 for gene ENSG\d in spot .*raw: false"):
        read_spots("a", h5ad=tmp_path / "a.h5ad")
    logged = read_spots("a", h5ad=tmp_path / "a.h5ad", raw=False, all_spots=True)
    np.testing.assert_array_equal(logged.X.toarray(), data.X.toarray())
    data.layers["counts"] = counts
    data.write_h5ad(tmp_path / "a.h5ad")
    slide = read_spots("a", h5ad=tmp_path / "a.h5ad", all_spots=True)
    np.testing.assert_array_equal(slide.X.toarray(), counts.toarray())
    data.X.data[3] = np.nan
    data.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match="holds nan"):
        read_spots("a", h5ad=tmp_path / "a.h5ad", raw=False)


def test_h5ad_of_several_slides(tmp_path):
    data = annotated(2)
    half = data.n_obs // 2
    data.obs["slide_id"] = ["one"] * half + ["two"] * half
    data.write_h5ad(tmp_path / "a.h5ad")
    slide = read_spots("two", h5ad=tmp_path / "a.h5ad", all_spots=True)
    assert slide.obs_names.tolist() == data.obs_names[half:].tolist()
    with pytest.raises(UserError, match="holds the slides one, two, not 'three'"):
        read_spots("three", h5ad=tmp_path / "a.h5ad")


def test_h5ad_that_is_none(tmp_path):
    path = tmp_path / "a.h5ad"
    with pytest.raises(UserError, match="as h5ad"):
        read_spots("a", h5ad=path)
    path.write_text("no")
    with pytest.raises(UserError, match="as h5ad"):
        read_spots("a", h5ad=path)
    data = annotated()
    data.X = None
    data.write_h5ad(path)
    with pytest.raises(UserError, match="has no values"):
        read_spots("a", h5ad=path)
    data = annotated()
    del data.obsm["spatial"]
    data.write_h5ad(path)
    with pytest.raises(UserError, match=r'has no positions: obsm\["spatial"\].* has nothing'):
        read_spots("a", h5ad=path)


def test_hest_folder(tmp_path):
    for folder in ("st", "wsis", "metadata"):
        (tmp_path / folder).mkdir()
    data = annotated()
    data.write_h5ad(tmp_path / "st" / "TENX1.h5ad")
    Image.new("RGB", (400, 300), "white").save(tmp_path / "wsis" / "TENX1.tif")
    metadata = {"pixel_size_um_estimated": 2.49, "patient": "Patient 3", "inter_spot_dist": 100.0}
    (tmp_path / "metadata" / "TENX1.json").write_text(json.dumps(metadata))
    slide = read_spots("TENX1", hest=tmp_path)
    assert slide.var_names.tolist() == ["a", "b", "c"]
    assert (slide.obs["patient_id"] == "Patient 3").all()
    told = slide.uns["seq2expr"]
    assert (told["mpp"], told["mpp_source"]) == (2.49, "metadata of HEST-1k")
    source = slide.uns["spatial"]["TENX1"]["metadata"]["source_image_path"]
    assert source == str(tmp_path / "wsis" / "TENX1.tif")
    metadata["pixel_size_um_estimated"] = 2.0
    metadata["patient"] = float("nan")
    (tmp_path / "metadata" / "TENX1.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"2 um per pixel \(metadata of HEST-1k\) and 2.5 \(pitch"):
        read_spots("TENX1", hest=tmp_path)
    (tmp_path / "metadata" / "TENX1.json").unlink()
    assert (read_spots("TENX1", hest=tmp_path).obs["patient_id"] == "").all()
    with pytest.raises(UserError, match=r"no sample 'TENX2' .* Its samples are TENX1"):
        read_spots("TENX2", hest=tmp_path)


# --- positions alone --------------------------------------------------------------------------


def test_positions_of_every_kind(tmp_path):
    spots = square().assign(new_x=0.1, new_y=0.2)
    spots.loc[3, "selected"] = 0
    spots.to_csv(tmp_path / "s_selection.tsv", sep="\t", index=False)
    table = read_positions(tmp_path / "s_selection.tsv")
    assert table.columns.tolist() == ["id", "x", "y", "array_row", "array_col", "selected"]
    assert len(table) == 24
    assert "0x3" not in set(table["id"])
    assert table.loc[7].tolist() == ["1x3", 60.0, 130.0, 3, 1, True]
    assert table.attrs["left_out"] == {"not selected": 1}
    assert table.attrs["nominal_um"] == {"square": 200}
    assert len(read_positions(tmp_path / "s_selection.tsv", all_spots=True)) == 25
    write_ranger(tmp_path / "v1", version=1)
    write_ranger(tmp_path / "v2", version=2)
    annotated().write_h5ad(tmp_path / "a.h5ad")
    first = read_positions(tmp_path / "v1" / "spatial" / "tissue_positions_list.csv")
    assert first["id"].iloc[0] == "B0-2-1"
    assert first.attrs["left_out"] == {"not selected": 6}
    assert first.attrs["nominal_um"] == {"hex": 100}
    for other in ("v1", "v2", "v2/spatial/tissue_positions.csv"):
        pd.testing.assert_frame_equal(read_positions(tmp_path / other), first)
    visium().to_parquet(tmp_path / "p.parquet")
    pd.testing.assert_frame_equal(read_positions(tmp_path / "p.parquet"), first)
    same = read_positions(tmp_path / "a.h5ad").drop(columns="id")
    pd.testing.assert_frame_equal(same, first.drop(columns="id"))


def test_plain_positions(tmp_path):
    path = tmp_path / "spots.csv"
    path.write_text("id,x,y\na,1.5,2\nb,3,4\na,5,6\nc,,7\n")
    table = read_positions(path)
    assert table.values.tolist() == [["a", 1.5, 2, -1, -1, True], ["b", 3, 4, -1, -1, True]]
    assert table.attrs["left_out"] == {
        "spot without a pixel position": 1,
        "spot id met again in the positions": 1,
    }
    path.write_text(
        "id\tx\ty\tin_tissue\tarray_row\tarray_col\n7\t1\t2\tTrue\t0\t5\n8\t3\t4\t0\t1\t6\n"
    )
    assert read_positions(path).values.tolist() == [["7", 1.0, 2.0, 0, 5, True]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,x\na,1\n", "has the columns id, x. Spots need"),
        ("id,x,y\na,1,far\n", "'far' in column y is no number"),
        ("id,x,y\n", "the table is empty"),
        ("", "Cannot read the spots"),
        ("id,x,y,selected\na,1,2,maybe\n", "'maybe' in column selected is neither 0 nor 1"),
        ("id,x,y,selected\na,1,2,0\n", "1 not selected. Give --all-spots"),
        ("x,y,pixel_x,pixel_y\n1.5,2,3,4\n", "'1.5' in column x is no whole number"),
        ("barcode,in_tissue\nb,1\n", "lacks array_row, array_col, pxl_row_in_fullres"),
        ("b,1,2,3\n", "lacks barcode"),
    ],
)
def test_positions_that_are_none(tmp_path, text, message):
    path = tmp_path / "spots.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_positions(path)


def test_missing_positions(tmp_path):
    with pytest.raises(UserError, match="Cannot read the spots"):
        read_positions(tmp_path / "none.csv")
    (tmp_path / "p.parquet").write_text("no")
    with pytest.raises(UserError, match="Cannot read the spots"):
        read_positions(tmp_path / "p.parquet")


# --- real data --------------------------------------------------------------------------------

HER2ST = {  # spots, genes, positions without counts
    "C2": (187, 15706, 0),
    "C3": (180, 15821, 2),
    "C4": (184, 15842, 3),
    "C5": (181, 15721, 2),
}


def her2st(root, section):
    (image,) = (root / "her2st" / "ST-imgs" / "C" / section).glob("*.jpg")
    return {
        "image": image,
        "counts": root / "her2st" / "ST-cnts" / f"{section}.tsv.gz",
        "spots": root / "her2st" / "ST-spotfiles" / f"{section}_selection.tsv",
    }


def assert_inside(slide, size):
    xy = slide.obsm["spatial"]
    assert (xy >= 0).all()
    assert (xy < size).all()


@pytest.mark.realdata
@pytest.mark.parametrize("section", HER2ST)
def test_her2st_loads(realdata, section):
    slide = read_spots(section, **her2st(realdata, section), patient="C")
    spots, genes, without = HER2ST[section]
    assert slide.shape == (spots, genes)
    told = slide.uns["seq2expr"]
    assert told["left_out"] == ({"position without counts": without} if without else {})
    assert told["mpp"] == pytest.approx(0.69, rel=0.01)
    assert told["layout"] == "square"
    assert_inside(slide, (9270, 9901))


@pytest.mark.realdata
def test_the_dark_section_loads_at_its_scale(realdata):
    dark = realdata / "her2st" / "extra_dark"
    files = {
        "image": dark / "A1_HE_image_dark.png",
        "counts": dark / "A1.tsv.gz",
        "spots": dark / "A1_selection.tsv",
    }
    slide = read_spots("A1", **files, patient="A", spot_scale=2000 / 6954)
    assert slide.shape == (346, 15045)
    assert slide.uns["seq2expr"]["left_out"] == {"position without counts": 2}
    assert slide.uns["seq2expr"]["mpp"] == pytest.approx(3.2, rel=0.01)
    assert_inside(slide, (2000, 2138))
    with pytest.raises(UserError, match="346 of 346 spots lie outside"):
        read_spots("A1", **files)
    with pytest.raises(UserError, match=r"'9.02' in column x is no whole number"):
        read_positions(dark / "A1_labeled_coordinates.tsv")


@pytest.mark.realdata
@pytest.mark.parametrize(("section", "spots", "lost"), [("MOB1", 379, 11), ("MOB2", 407, 8)])
def test_the_olfactory_bulb_loads(realdata, section, spots, lost):
    root = realdata / "mob"
    files = {
        "image": root / f"{section}.jpg",
        "counts": root / f"{section}.tsv.gz",
        "spots": root / f"alignment_table_{section}.tsv",
    }
    with pytest.raises(UserError, match="without a scale"):
        read_spots(section, **files)
    slide = read_spots(section, **files, mpp=4.36)
    assert slide.shape == (spots, 1000)
    assert slide.uns["seq2expr"]["left_out"]["counts without a position"] == lost
    assert slide.uns["seq2expr"]["layout"] == "staggered"
    assert slide.uns["seq2expr"]["pitch_um"] == pytest.approx(141, rel=0.005)
    assert slide.var_names.str.fullmatch(r"ENSMUSG\d+").sum() == 1000
    assert_inside(slide, (1905, 1905))


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "spots", "left_out"),
    [
        ("SpatialExperiment/section1", 22, {"not selected": 28}),
        ("SpatialExperiment/section2", 22, {"not selected": 27, "counts without a position": 1}),
        ("scanpy_1.0.0", 100, {"position without counts": 4135}),
        ("squidpy", 100, {}),
    ],
)
def test_the_folders_of_other_projects_parse(realdata, folder, spots, left_out):
    root = realdata / "visium_small" / folder
    slide = read_spots("s", space_ranger=root)
    assert slide.n_obs == spots
    told = slide.uns["seq2expr"]
    assert told["left_out"] == left_out
    assert told["layout"] == "hex"
    assert told["mpp"] == pytest.approx(0.7268, abs=2e-4)
    picture = next((root / "spatial").glob("*.png"))
    with pytest.raises(UserError, match=r"is the (hires|lowres) picture"):
        read_spots("s", space_ranger=root, image=picture)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("file", "value"),
    [("squidpy/test_data.h5ad", "1.06409"), ("stlearn/test_data.h5", "-0.322006")],
)
def test_logged_and_scaled_files_are_refused(realdata, file, value):
    path = realdata / "visium_small" / file
    with pytest.raises(UserError, match=f"holds {value} for gene"):
        read_spots("s", h5ad=path)
    slide = read_spots("s", h5ad=path, raw=False)
    assert slide.uns["seq2expr"]["raw"] is False


# Labels


def test_labels_join_by_rounded_place_or_by_id(tmp_path):
    placed = tmp_path / "placed.tsv"
    placed.write_text(
        "Row.names\tx\ty\tlabel\na\t1.98\t3.02\ttumour\nb\tNA\t2\tlost\nc\t4\t5\tfat\n"
    )
    assert read_labels(placed).to_dict() == {"2x3": "tumour", "4x5": "fat"}
    named = tmp_path / "named.csv"
    named.write_text("id,label\nAAAC-1,tumour\nCCCA-1,\n")
    assert read_labels(named).to_dict() == {"AAAC-1": "tumour"}
    named.write_text("id,label\nAAAC-1,tumour\nAAAC-1,fat\n")
    with pytest.raises(UserError, match="labels the spot 'AAAC-1' twice"):
        read_labels(named)
    named.write_text("id,class\nAAAC-1,tumour\n")
    with pytest.raises(UserError, match="Labels need label, and id, or x and y"):
        read_labels(named)


@pytest.mark.realdata
def test_labels_of_her2st_match_every_spot(realdata):
    folder = realdata / "her2st" / "extra_dark"
    slide = read_spots(
        "A1",
        image=folder / "A1_HE_image_dark.png",
        counts=folder / "A1.tsv.gz",
        spots=folder / "A1_selection.tsv",
        spot_scale=0.2876,
        labels=folder / "A1_labeled_coordinates.tsv",
    )
    found = slide.obs["label"].value_counts(dropna=False).to_dict()
    assert sum(found.values()) == 346
    assert found["invasive cancer"] == 282
    assert set(found) == {
        *("invasive cancer", "connective tissue", "cancer in situ", "adipose tissue"),
        *("undetermined", "immune infiltrate"),
    }
