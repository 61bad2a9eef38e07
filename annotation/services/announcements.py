"""Tells open pages that a project's numbers changed. The message carries no numbers: each page asks for what it may see."""

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import transaction

from annotation.groups import project_group


def progress_announce(*, project_id: int) -> None:
    """Send `progress.changed` to the project's group once the transaction is in the database.

    `robust`: a channel layer that does not answer is logged, and never turns a stored ranking into an error page.
    """

    def send() -> None:
        layer = get_channel_layer()
        if layer is not None:
            async_to_sync(layer.group_send)(project_group(project_id), {"type": "progress.changed", "project_id": project_id})

    transaction.on_commit(send, robust=True)
