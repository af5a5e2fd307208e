"""Files for the tests of imports, made here."""

import io

from reportlab.lib import pdfencrypt
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.cidfonts import UnicodeCIDFont
from reportlab.pdfgen import canvas

JAPANESE = "北海道には梅雨がないと言われている。"


def pdf(*pages: tuple[str, ...], title: str | None = None, password: str | None = None) -> bytes:
    """A PDF of these lines, with a Japanese font that every reader has; a page without lines is blank."""
    pdfmetrics.registerFont(UnicodeCIDFont("HeiseiMin-W3"))
    file = io.BytesIO()
    encrypt = None if password is None else pdfencrypt.StandardEncryption(password, ownerPassword="o", strength=128)
    paper = canvas.Canvas(file, invariant=1, encrypt=encrypt)
    if title is not None:
        paper.setTitle(title)
    for lines in pages:
        paper.setFont("HeiseiMin-W3", 12)
        for number, line in enumerate(lines):
            paper.drawString(72, 750 - 20 * number, line)
        paper.showPage()
    paper.save()
    return file.getvalue()
