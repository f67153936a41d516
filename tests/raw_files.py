"""Raw data files as scanners and challenges leave them, written by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import ismrmrd
import numpy as np
from ismrmrd import xsd


def complex_array(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def write_mat73(path: Path, key: str, array: np.ndarray, **layout: Any) -> Path:
    """As MATLAB writes complex arrays, `array` being in the order that HDF5 shows: a compound of real and imag."""
    compound = np.empty(array.shape, [("real", "<f8"), ("imag", "<f8")])
    compound["real"], compound["imag"] = array.real, array.imag
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset(key, data=compound, **layout)
        file.create_group("#refs#")
    return path


def xml_header(
    matrix: tuple[int, int],
    *,
    oversampling: float = 1.0,
    pixel_mm: tuple[float, float] = (1.5, 1.25),
    thickness_mm: float = 8.0,
    centre: int | None = None,
    protocol: str = "trufi_cine_SAX",
    vendor: str = "SIEMENS",
    trajectory: str = "cartesian",
    calibration: str | None = None,
) -> str:
    """The XML of one encoded space (ny, nx with oversampling); it names a patient, whom no reader may keep."""
    ny, nx = matrix

    def space(samples: int) -> xsd.encodingSpaceType:
        size = xsd.matrixSizeType(x=samples, y=ny, z=1)
        field = xsd.fieldOfViewMm(x=pixel_mm[1] * samples, y=pixel_mm[0] * ny, z=thickness_mm)
        return xsd.encodingSpaceType(matrixSize=size, fieldOfView_mm=field)

    limit = xsd.limitType(minimum=0, maximum=ny - 1, center=ny // 2 if centre is None else centre)
    encoding = xsd.encodingType(
        encodedSpace=space(nx),
        reconSpace=space(round(nx / oversampling)),
        encodingLimits=xsd.encodingLimitsType(kspace_encoding_step_1=limit),
        trajectory=xsd.trajectoryType(trajectory),
    )
    if calibration:
        factor = xsd.accelerationFactorType(kspace_encoding_step_1=2, kspace_encoding_step_2=1)
        mode = xsd.calibrationModeType(calibration)
        encoding.parallelImaging = xsd.parallelImagingType(accelerationFactor=factor, calibrationMode=mode)
    header = xsd.ismrmrdHeader(
        subjectInformation=xsd.subjectInformationType(patientName="Jane Doe", patientID="4711"),
        measurementInformation=xsd.measurementInformationType(patientPosition="HFS", protocolName=protocol),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor=vendor, systemFieldStrength_T=1.494, institutionName="St. Elsewhere"
        ),
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=63_600_000),
        encoding=[encoding],
    )
    return xsd.ToXML(header)


def acquisition(samples: np.ndarray, *flags: int, **fields: Any) -> ismrmrd.Acquisition:
    """One readout ``coil sample``; `fields` go to the header, and the counters among them to its `idx`."""
    counters = {name for name, _ in ismrmrd.EncodingCounters._fields_}
    idx = ismrmrd.EncodingCounters(**{name: int(value) for name, value in fields.items() if name in counters})
    rest = {name: value for name, value in fields.items() if name not in counters}
    head = {"center_sample": samples.shape[1] // 2, "slice_dir": (0, 0, 1), "idx": idx} | rest
    done = ismrmrd.Acquisition.from_array(samples, **head)
    for flag in flags:
        done.set_flag(flag)
    return done


def lines_of(
    kspace: np.ndarray, change: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
) -> Iterator[ismrmrd.Acquisition]:
    """Every line of ``slice coil t ky kx`` with its place (10 mm apart, towards the apex) and its time (40 ms a frame).

    `change` may alter the header's fields of a line, or leave the line out by returning None.
    """
    for n, t, ky in np.ndindex(kspace.shape[0], kspace.shape[2], kspace.shape[3]):
        fields: dict[str, Any] = {
            "slice": n,
            "phase": t,
            "kspace_encode_step_1": ky,
            "position": (0, 0, -10.0 * n + 3),
            "physiology_time_stamp": (16 * t, 0, 0),
        }
        changed = change(fields) if change else fields
        if changed is not None:
            yield acquisition(np.ascontiguousarray(kspace[n, :, t, ky]), **changed)


def write_ismrmrd(path: Path, xml: str, lines: Iterable[ismrmrd.Acquisition], *, append: bool = False) -> Path:
    """A file of the `ismrmrd` package's layout; `append`: by its own slow method, one acquisition after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ismrmrd.Dataset(str(path), mode="w") as file:
        file.write_xml_header(xml.encode())
        if append:
            for line in lines:
                file.append_acquisition(line)
            return path
        every = list(lines)
        rows = np.empty(len(every), ismrmrd.hdf5.acquisition_dtype)
        for row, line in zip(rows, every, strict=True):
            row["head"] = np.frombuffer(line.getHead(), ismrmrd.hdf5.acquisition_header_dtype)[0]
            row["data"], row["traj"] = line.data.reshape(-1).view(np.float32), np.empty(0, np.float32)
        file._dataset.create_dataset("data", data=rows, chunks=(1,), maxshape=(None,), dtype=rows.dtype)
    return path
