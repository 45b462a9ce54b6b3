"""Read by PyInstaller when an app imports candle_phi: the modules it finds itself, the bundled model is data."""

from PyInstaller.utils.hooks import collect_data_files  # type: ignore  # installed only where apps are built

datas = collect_data_files("candle_phi", includes=["demo/*.gguf"])
