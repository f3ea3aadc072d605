"""Pictures of the user's rows: read from files or bytes, never from the network, and told apart by their bytes."""

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

#: Directory beside a file of rows that holds the pictures which were written with it.
IMAGES = "images"
#: What is read. Pillow knows many more, some by running other programs.
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
_FIX = "Give an image file that can be opened, or leave the row out."


@dataclass(frozen=True)
class Picture:
    """An encoded picture (PNG, JPEG, ...). Equal where the bytes are, whatever file they are in.

    Attributes:
        sha256: of the encoded bytes, in hex.
        name: what messages call it.
        path: its file; None where ``content`` holds the bytes.
        content: the bytes; None where they are in a file.
    """

    sha256: str
    name: str = field(compare=False)
    path: Path | None = field(default=None, compare=False)
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, source: Any, directory: Path, *, confined: bool = False) -> "Picture":
        """Find a picture; nothing is decoded yet.

        Args:
            source: a path, relative to ``directory``; the encoded bytes; ``{"bytes": ..., "path": ...}``, as Parquet
                and data sets of the hub hold it; or a PIL image.
            directory: of the file of rows.
            confined: whether a path must stay within ``directory``, symbolic links resolved.

        Raises:
            EmlocError: there is no such file, or ``source`` is something else.
        """
        if isinstance(source, Mapping) and (source.get("bytes") is not None or source.get("path") is not None):
            source = source["path"] if source.get("bytes") is None else source["bytes"]
        if isinstance(source, bytes):
            return cls(_hash(source), f"An image of {len(source)} bytes", content=source)
        if isinstance(source, str | Path):
            return cls._at(str(source), directory, confined=confined)
        if hasattr(source, "save") and hasattr(source, "convert"):  # PIL's, which may not be installed
            content = BytesIO()
            source.save(content, format="PNG")
            return cls.of(content.getvalue(), directory)
        raise EmlocError(
            f"An image is {type(source).__name__}.", "Give a path, bytes, or both as an object with `bytes` and `path`."
        )

    @classmethod
    def _at(cls, source: str, directory: Path, *, confined: bool) -> "Picture":
        if "://" in source or source.startswith("data:"):
            raise EmlocError(f"The image {source[:80]} is not a path.", "Download it, and give the path of the file.")
        path = directory / source
        if confined and not path.resolve().is_relative_to(directory.resolve()):
            raise EmlocError(f"The image {source} lies outside {directory}.", "Do not use these rows.")
        try:
            require_regular(path)
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise EmlocError(f"The image {path} {reason}.", "Paths are relative to the file of rows.") from None
        return cls(_hash(content), f"The image {path}", path=path)

    def read(self) -> "Image":
        """Return the picture in RGB, upright as its EXIF data say.

        Raises:
            EmlocError: it is no image, or cut short; or Pillow is not installed.
        """
        pil, content = pillow(), self._bytes()
        try:
            with self._opened(content) as image:
                return _upright(image).convert("RGB")
        except pil.UnidentifiedImageError:  # its message names a buffer
            raise EmlocError(f"{self.name} is no image ({', '.join(FORMATS)}).", _FIX) from None
        except (OSError, SyntaxError, ValueError, EOFError, pil.DecompressionBombError) as error:
            raise EmlocError(f"{self.name} is damaged: {error}.", _FIX) from None

    def write(self, directory: Path) -> str:
        """Copy the encoded bytes into a directory, named by their hash; return the path relative to it.

        Raises:
            EmlocError: as :meth:`read`.
        """
        content = self._bytes()
        self.read()  # what is kept will be needed
        with self._opened(content) as image:
            name = f"{IMAGES}/{self.sha256}.{str(image.format).lower()}"
        (directory / IMAGES).mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        return name

    def _opened(self, content: bytes) -> "Image":
        """Open the picture, of which nothing but its head is decoded yet."""
        pil = pillow()
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            try:
                return pil.open(BytesIO(content), formats=FORMATS)
            except (pil.DecompressionBombWarning, pil.DecompressionBombError):
                most = pil.MAX_IMAGE_PIXELS // 10**6
                raise EmlocError(f"{self.name} has more than {most} megapixels.", "Scale it down.") from None

    def _bytes(self) -> bytes:
        if self.content is not None:
            return self.content
        assert self.path is not None
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise EmlocError(f"{self.name} cannot be read any more ({error}).", _FIX) from None
        if _hash(content) != self.sha256:
            raise EmlocError(f"{self.name} has changed since the rows were read.", "Run the command again.")
        return content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _upright(image: "Image") -> "Image":
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def pillow() -> Any:
    """Return Pillow's module ``PIL.Image``.

    Raises:
        EmlocError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise EmlocError("Images need Pillow, which is not installed.", "pip install 'emloc[vision]'") from None
    return Image
