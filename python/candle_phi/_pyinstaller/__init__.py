"""What PyInstaller asks for (entry point `pyinstaller40`): where the hook is that adds the bundled model to an app."""


def get_hook_dirs() -> list[str]:
    return [*__path__]
