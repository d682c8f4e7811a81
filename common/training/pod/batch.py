"""How many images of a step each device has."""


def images_of_device(batch_size: int, devices: int, asked: int | None = None) -> tuple[int, str]:
    """Images a device, and a note where the step is not that of the config.

    Args:
      batch_size: of the config, of all devices together.
      devices: of the slice.
      asked: images a device that the user wants; None: as the config says.

    Returns:
      `asked`, else the config's share of a device, else two where it has none; and the note or ''.
    """
    if asked is None and batch_size >= devices and batch_size % devices == 0:
        return batch_size // devices, ""
    images = 2 if asked is None else asked
    if images * devices == batch_size:
        return images, ""
    why = "" if asked else f", which {devices} devices cannot share evenly"
    return images, (
        f"note: planned with a batch of {images * devices}, {images} a device; "
        f"config.data.batch_size is {batch_size}{why}"
    )
