"""What a system that trains another one knows of it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from seq2expr.errors import UserError
from seq2expr.model.spot_system import SpotConfig, SpotSystem
from seq2expr.model.system import check_settings, settings_of, system_class

_SHARED = (*settings_of(SpotConfig), *SpotConfig.fitted)


class WrapperConfig(SpotConfig):
    """Configuration of a system around another one.

    What all image systems have (patch, head) is set here and passed on.

    Parameters
    ----------
    encoder
        By default that of the wrapped system.
    wraps
        Name of the system that is trained.
    inner
        Further settings of it.
    found
        What it fitted.
    """

    derived: ClassVar[tuple[str, ...]] = ("found",)

    encoder: str | dict | None = None
    wraps: str = "triplex"
    inner: dict | None = None
    found: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.inner = dict(self.inner or {})
        check_inner(self.wraps, self.inner)
        self.encoder = self.encoder or self.sight.encoder
        super().__post_init__(**kwargs)

    @property
    def sight(self) -> SpotConfig:
        """The configuration of the wrapped system."""
        wrapped = system_class(self.wraps).config_class
        # What further is fitted for the wrapped system is held here under the same names.
        passed = {name: getattr(self, name, None) for name in (*_SHARED, *wrapped.fitted)}
        given = {k: v for k, v in (passed | self.for_inner()).items() if v is not None}
        return wrapped(**self.inner, **given, **(self.found or {}))

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a batch that a prediction reads: those of the wrapped system."""
        return self.sight.reads

    @property
    def reads_text(self) -> bool:
        """Whether the wrapped system describes genes by texts."""
        return self.sight.reads_text

    def for_inner(self) -> dict[str, Any]:
        """Return what the wrapped system has otherwise than this one."""
        return {}


def check_inner(wraps: str, settings: Mapping[str, Any]) -> None:
    """Refuse a system that cannot be wrapped, or settings of it that are none (``UserError``)."""
    wrapped = system_class(wraps)
    if not issubclass(wrapped, SpotSystem) or issubclass(wrapped.config_class, WrapperConfig):
        raise UserError(
            f"model.wraps is {wraps!r}; it can be an image system that wraps no other."
        )
    if wrapped.reads_expression:
        raise UserError(
            f"model.wraps is {wraps!r}, which pairs a patch with the expression of the panel; "
            "further genes have no place in that. Wrap a system that reads none, such as triplex."
        )
    for name in settings:
        if name in _SHARED:
            raise UserError(f"model.inner.{name} is set; set model.{name}, which is passed on.")
    try:
        check_settings(wrapped.config_class, settings)
    except UserError as error:
        raise UserError(f"model.inner, settings of {wraps}: {error}") from error
