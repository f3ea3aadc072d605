"""Images of the user's rows: read from files or bytes, never from the network, and compared by their bytes."""

import base64
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.files.own import require_regular

if TYPE_CHECKING:
    from PIL.Image import Image

#: Directory beside a file of rows with the images that were written with it.
IMAGES = "images"
#: Supported formats. Pillow knows many more; for some it runs other programs.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
#: How PNG, JPEG, WEBP, GIF, BMP and TIFF start in base64, and the least length of an image: no path looks like that.
_LEAST = 64
_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk0", "SUkqA", "TU0AK")
_FIX = "Give an image file that can be opened, or leave the row out."


@dataclass(frozen=True)
class Picture:
    """An encoded image (PNG, JPEG, ...). Pictures with equal bytes are equal, whatever file they are in.

    Attributes:
        sha256: SHA-256 of the encoded bytes, in hex.
        name: its name in messages.
        path: its file; None if ``content`` holds the bytes.
        content: the bytes; None if they are in a file.
    """

    sha256: str
    name: str = field(compare=False)
    path: Path | None = field(default=None, compare=False)
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_source(cls, source: Any, directory: Path, *, confined: bool = False) -> "Picture":
        """Find an image, without decoding it.

        Args:
            source: a path, relative to ``directory``; the encoded bytes, also in base64, alone or as a ``data:`` URI;
                ``{"bytes": ..., "path": ...}``, as in Parquet files and hub datasets; or a PIL image.
            directory: directory of the file of rows.
            confined: whether a path must stay within ``directory``, symbolic links resolved.

        Raises:
            EmlocError: there is no such file, or ``source`` is none of these.
        """
        if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
            source = source["path"] if source.get("bytes") is None else source["bytes"]
        if isinstance(source, bytes):
            return cls(_hash(source), f"An image of {len(source)} bytes", content=source)
        if isinstance(source, str) and (decoded := _from_base64(source)) is not None:
            return cls.from_source(decoded, directory)
        if isinstance(source, str | Path):
            return cls._from_path(str(source), directory, confined=confined)
        if hasattr(source, "save") and hasattr(source, "convert"):  # PIL's, which may not be installed
            content = BytesIO()
            source.save(content, format="PNG")
            return cls.from_source(content.getvalue(), directory)
        raise EmlocError(
            f"An image is given as {type(source).__name__}.",
            "Give a path, bytes, or both as an object with `bytes` and `path`.",
        )

    @classmethod
    def _from_path(cls, source: str, directory: Path, *, confined: bool) -> "Picture":
        if "://" in source:
            raise EmlocError(f"The image {source[:80]} is not a path.", "Download it, and give the path of the file.")
        path = directory / source
        if confined and not path.resolve().is_relative_to(directory.resolve()):
            raise EmlocError(
                f"The image {source} is outside {directory}.",
                "Do not use these rows: those in an output name only images inside it.",
                code="refused",
            )
        try:
            require_regular(path)
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            code = "missing" if isinstance(error, FileNotFoundError) else "unavailable"
            raise EmlocError(
                f"The image {path} {reason}.", "Paths are relative to the file of rows.", code=code
            ) from None
        return cls(_hash(content), f"The image {path}", path=path)

    def read(self) -> "Image":
        """Return the image in RGB, rotated according to its EXIF data.

        Raises:
            EmlocError: it is not an image, or is truncated; or Pillow is not installed.
        """
        pil, content = pillow(), self._bytes()
        from PIL import ImageOps

        try:
            with self._opened(content) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except pil.UnidentifiedImageError:  # its message names a buffer
            raise EmlocError(f"{self.name} is not an image ({', '.join(FORMATS)}).", _FIX) from None
        except (OSError, SyntaxError, ValueError, EOFError, pil.DecompressionBombError) as error:
            raise EmlocError(f"{self.name} is damaged: {error}.", _FIX, code="damaged") from None

    def write(self, directory: Path) -> str:
        """Copy the encoded bytes into a directory, named by their hash; return the path relative to it.

        Raises:
            EmlocError: as :meth:`read`.
        """
        content = self._bytes()
        self.read()  # keep only images that can be read later
        with self._opened(content) as image:
            name = f"{IMAGES}/{self.sha256}.{str(image.format).lower()}"
        (directory / IMAGES).mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        return name

    def _opened(self, content: bytes) -> "Image":
        """Open the image; only its header is decoded yet."""
        pil = pillow()
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            try:
                return pil.open(BytesIO(content), formats=FORMATS)
            except (pil.DecompressionBombWarning, pil.DecompressionBombError):
                most = pil.MAX_IMAGE_PIXELS // 10**6
                raise EmlocError(
                    f"{self.name} has more than {most} megapixels.", "Scale it down.", code="refused"
                ) from None

    def _bytes(self) -> bytes:
        if self.content is not None:
            return self.content
        assert self.path is not None
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise EmlocError(f"{self.name} can no longer be read ({error}).", _FIX, code="changed") from None
        if _hash(content) != self.sha256:
            raise EmlocError(
                f"{self.name} has changed since the rows were read.", "Run the command again.", code="changed"
            )
        return content


def _from_base64(text: str) -> bytes | None:
    """Return the image that a text holds in base64; None if the text is something else, such as a path."""
    is_uri = text.startswith("data:")
    if not is_uri and not (text.startswith(_STARTS) and len(text) >= _LEAST):
        return None
    try:
        return base64.b64decode(text.partition(",")[2] if is_uri else text, validate=True)
    except ValueError:
        if is_uri:
            raise EmlocError(f"The image {text[:40]} ... is not valid base64.", "Correct it.", code="damaged") from None
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pillow() -> Any:
    """Return Pillow's module ``PIL.Image``.

    Raises:
        EmlocError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise EmlocError(
            "Images need Pillow, which is not installed.", "pip install 'emloc[vision]'", code="unavailable"
        ) from None
    return Image
