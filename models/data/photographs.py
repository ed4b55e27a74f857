"""The photographs of scikit-image that the shipped checkpoints are trained and tested on."""

from PIL import Image

TRAINED_ON = ["astronaut", "chelsea", "rocket", "stereo_motorcycle", "camera"]
TRAINED_ON += ["coins", "brick", "gravel"]
HELD_OUT = "coffee"
PART = (108, 72, 492, 328)  # (left, top, right, bottom): the middle of the held-out photograph


def photographs(*names: str) -> list[Image.Image]:
    """Returns the photographs with these names in scikit-image as RGB images; a stereo pair counts as two.

    Raises:
        ImportError: scikit-image is not installed.
    """
    import skimage.data

    found = []
    for name in names:
        arrays = getattr(skimage.data, name)()
        arrays = arrays[:2] if isinstance(arrays, tuple) else [arrays]
        found += [Image.fromarray(array).convert("RGB") for array in arrays]
    return found
