"""How pictures of the commands look."""

import io


def as_png(figure, axes) -> bytes:
    """A figure with one pair of axes, as all of this package look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()
