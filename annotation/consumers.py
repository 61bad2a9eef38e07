"""Live progress over one WebSocket, /ws/live/. The client names what it watches; each answer is what this person may see now.

-> {"do": "project.watch", "project": "slug"}      <- {"event": "progress", "progress": {...totals}}
-> {"do": "project.unwatch", "project": "slug"}    <- {"event": "refused", "error": {"code", "message"}}
"""

import asyncio
import json
from typing import Any

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.http import Http404

from annotation import selectors
from annotation.errors import error_body
from annotation.groups import project_group

LONGEST_MESSAGE_CHARACTERS = 2_000
MOST_PROJECTS = 20
# Many raters submit within a second; a page needs no more than a few numbers a second.
QUIET_SECONDS = 0.25


class LiveConsumer(AsyncJsonWebsocketConsumer):
    async def connect(self) -> None:
        self.watched: dict[int, str] = {}
        self.pending: dict[int, asyncio.Task[None]] = {}
        if not self.scope["user"].is_authenticated:
            await self.close(code=4401)
            return
        await self.accept()

    async def disconnect(self, code: int) -> None:
        for task in self.pending.values():
            task.cancel()
        for project_id in self.watched:
            await self.channel_layer.group_discard(project_group(project_id), self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None, **_: Any) -> None:
        handlers = {"project.watch": self.watch, "project.unwatch": self.unwatch}
        try:
            if text_data is None or len(text_data) > LONGEST_MESSAGE_CHARACTERS:
                raise ValueError
            message = json.loads(text_data)
            handler, slug = handlers[message["do"]], message["project"]
            if not isinstance(slug, str) or "\x00" in slug:
                raise ValueError
            slug.encode()
        except (ValueError, KeyError, TypeError, RecursionError):
            await self.refuse("invalid", 'Send {"do": "project.watch", "project": "..."}.')
            return
        await handler(slug)

    async def watch(self, slug: str) -> None:
        seen = await self.read(slug)
        if seen is None:
            await self.refuse("not_found", "There is no such project, or you are not a member of it.")
            return
        project_id, progress = seen
        if project_id not in self.watched and len(self.watched) >= MOST_PROJECTS:
            await self.refuse("too_many", f"At most {MOST_PROJECTS} projects on one connection.")
            return
        self.watched[project_id] = slug
        await self.channel_layer.group_add(project_group(project_id), self.channel_name)
        await self.send_json({"event": "progress", "progress": progress})

    async def unwatch(self, slug: str) -> None:
        for project_id in [key for key, value in self.watched.items() if value == slug]:
            del self.watched[project_id]
            await self.channel_layer.group_discard(project_group(project_id), self.channel_name)

    async def progress_changed(self, event: dict[str, Any]) -> None:
        """From `progress_announce`. Announcements that come close together are answered once."""
        project_id = event["project_id"]
        running = self.pending.get(project_id)
        if project_id in self.watched and (running is None or running.done()):
            self.pending[project_id] = asyncio.create_task(self.tell(project_id))

    async def tell(self, project_id: int) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        del self.pending[project_id]
        slug = self.watched.get(project_id)
        seen = await self.read(slug) if slug is not None else None
        if seen is None:
            # The person was taken out of the project since he began to watch.
            if slug is not None:
                await self.unwatch(slug)
            return
        await self.send_json({"event": "progress", "progress": seen[1]})

    @database_sync_to_async
    def read(self, slug: str) -> tuple[int, dict[str, Any]] | None:
        """Permission and numbers together, so that no number is sent that was not permitted at that moment."""
        try:
            project, _ = selectors.project_for(user=self.scope["user"], slug=slug)
        except Http404:
            return None
        return project.pk, selectors.progress_of([project])[project.pk]

    async def refuse(self, code: str, message: str) -> None:
        await self.send_json({"event": "refused", **error_body(code, message)})
