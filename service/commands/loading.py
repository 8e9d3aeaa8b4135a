"""What commands share: settings from options and environment, a loaded captioner, and stopping in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import typer

from service.requirements_check import RequirementsError, onnx_runtime

if TYPE_CHECKING:
    from model.captioner import Captioner
    from service.settings import Settings


def stop(message: str, code: int = 2) -> NoReturn:
    """Says why on stderr and ends the command: code 2 for what cannot be asked, 1 for what failed."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def read_settings(**options: Any) -> Settings:
    """The settings of the environment (`DEECAP_...`), where an option that was given (not None) goes first.

    Ends the command, naming what is wrong, when a setting has a value that it cannot have.
    """
    from service.settings import Settings, SettingsError

    try:
        return Settings.load(**options)
    except SettingsError as error:
        stop(str(error))


def require_onnx_runtime() -> None:
    """Ends the command unless exactly one build of ONNX Runtime is installed."""
    try:
        onnx_runtime()
    except RequirementsError as error:
        stop(str(error), code=1)


def load_captioner(settings: Settings) -> Captioner:
    """The captioner of the settings' bundle, on their device; ends the command where it cannot be loaded."""
    require_onnx_runtime()
    from model.bundle import BundleError
    from model.captioner import Captioner

    try:
        precision = None if settings.precision == "auto" else settings.precision
        return Captioner.load(settings.bundle, settings.device, precision, settings.threads)
    except BundleError as error:
        stop(str(error))
