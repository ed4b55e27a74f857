"""The photographs of scikit-image that the shipped checkpoints are trained and tested on."""

from PIL import Image

TRAINED_ON = ["astronaut", "chelsea", "rocket", "stereo_motorcycle", "camera"]
TRAINED_ON += ["coins", "brick", "gravel"]
HELD_OUT = "coffee"
PART = (108, 72, 492, 328)  # of the held-out photograph: its middle


def photographs(name):
    """The photographs of that name in scikit-image, as RGB (a stereo pair counts as two)."""
    import skimage.data

    arrays = getattr(skimage.data, name)()
    arrays = arrays[:2] if isinstance(arrays, tuple) else [arrays]
    return [Image.fromarray(array).convert("RGB") for array in arrays]
