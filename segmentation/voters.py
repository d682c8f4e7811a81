"""The trained networks whose opinions on a box export puts together, and the crops they look at."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from ml_collections import ConfigDict

from common.data.dataset import Dataset
from common.data.model_classes import ModelClasses, read_model_classes, with_model_classes
from common.io.errors import UserError
from common.training import distributed
from common.training.compiling import announced
from common.training.restore import restore_variables
from common.training.step import variable_shapes
from common.training.workdir import read_config
from segmentation.batch_fields import init_shapes
from segmentation.crops.batches import BoxBatch, View
from segmentation.inference import Voter, vote_step
from segmentation.models.segmenter import Segmenter, build
from segmentation.settings import InferenceSettings, RunSettings, read_run


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network and how its crops are cut."""

    name: str
    step: int
    model: Segmenter
    variables: dict
    test: InferenceSettings
    classes: ModelClasses | None  # of a network with outputs for each class

    @property
    def view(self) -> View:
        """Networks with equal views look at the same crops."""
        return View(self.test.crop, self.test.canvases)


def open_network(settings: RunSettings, workdir: str, step: int | None, mesh: Mesh) -> Network:
    """Restores a checkpoint (None: the newest) on the devices of this process.

    Raises:
      UserError: no such checkpoint, one of another model, or one whose classes are not known.
    """
    classes = read_model_classes(workdir) if settings.model.class_specific else None
    num_classes = 1 if classes is None else classes.count
    model = build(settings.model, num_classes, distributed.DATA_AXIS)
    shapes = variable_shapes(model, init_shapes())
    variables, step = restore_variables(workdir, shapes, distributed.make_mesh(), step)
    if mesh.size < len(jax.devices()):
        variables = distributed.to_local(variables, mesh)
    return Network(settings.name, step, model, variables, settings.test, classes)


def with_classes_of(networks: Sequence[Network], dataset: Dataset) -> Dataset:
    """The dataset as the networks with outputs for each class see it.

    Raises:
      UserError: two of them have other classes, or the dataset has one that they lack.
    """
    lists = [network.classes for network in networks if network.classes is not None]
    for other in lists[1:]:
        if list(other.labels) != list(lists[0].labels):
            raise UserError(
                f"{other.source}: found other classes than in {lists[0].source}, expected voters "
                "of one class list (or config.model.class_specific=False)"
            )
    return with_model_classes(dataset, lists[0]) if lists else dataset


def open_voters(names: Sequence[str], mesh: Mesh) -> tuple[list[Network], list[Voter]]:
    """Restores the networks of --voters, WORK or WORK:flip, each once, and lists the voters.

    Raises:
      UserError: a folder is no work directory of a segmenter.
    """
    places: dict[str, int] = {}
    networks: list[Network] = []
    voters: list[Voter] = []
    for name in names:
        workdir, flip = name.removesuffix(":flip"), name.endswith(":flip")
        if workdir not in places:
            places[workdir] = len(networks)
            networks.append(open_network(_read_run(workdir), workdir, None, mesh))
        voters.append(Voter(places[workdir], flip or networks[places[workdir]].test.flip))
    return networks, voters


def _read_run(workdir: str) -> RunSettings:
    config = read_config(workdir)
    try:
        return read_run(ConfigDict(config))
    except UserError as error:
        raise UserError(
            f"{workdir}/config.json: not the config of a segmentation run ({error})"
        ) from error


class Panel:
    """All voters, sorted by the crops that they look at.

    Attributes:
      views: how crops are cut.
      weights: how many voters each probability map is the mean of, view by view.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        voters: Sequence[Voter],
        rule: str,
        mesh: Mesh,
        say: Callable,
    ):
        """The steps of all views, which compile when they are first called.

        Args:
          networks: that vote.
          voters: each with its network.
          rule: of `common.masks.vote`; with 'mean' a view has one map: its voters' mean.
          mesh: of the devices.
          say: where it is said what compiles.
        """
        mean = rule == "mean"
        self.views = list(dict.fromkeys(networks[v.network].view for v in voters))
        self.weights: list[int] = []
        self._steps = []
        self._mesh = mesh
        for view in self.views:
            members = [v for v in voters if networks[v.network].view == view]
            chosen = sorted({v.network for v in members})
            places = {network: i for i, network in enumerate(chosen)}
            step = vote_step(
                tuple(networks[i].model for i in chosen),
                tuple(Voter(places[v.network], v.flip) for v in members),
                mean,
                mesh,
            )
            step = announced(step, "segmenters", say)
            self._steps.append((step, tuple(networks[i].variables for i in chosen)))
            self.weights += [len(members)] if mean else [1] * len(members)

    def start(self, batch: BoxBatch, classes: Int32[np.ndarray, " b"]) -> jax.Array:
        """Sets the devices to work on one view of a batch of boxes; returns maps (b, V, Y, X)."""
        step, variables = self._steps[batch.view]
        fields = {
            "image": batch.image,
            "image_size": batch.image_size,
            "image_valid": batch.image_valid,
            "classes": classes,
        }
        return step(variables, distributed.to_global(fields, self._mesh))
