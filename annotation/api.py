"""The API at /api/v1/: the rater's verbs, the stream of rankings, the progress. Token or session; errors in one shape."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast
from uuid import UUID

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.http import StreamingHttpResponse
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema, inline_serializer
from rest_framework import serializers
from rest_framework.exceptions import APIException, ParseError
from rest_framework.parsers import JSONParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from annotation import selectors
from annotation.errors import Refused
from annotation.models import MAX_COMPLETIONS, Lease, Ranking, Skip, User
from annotation.services.leases import COMMENT_CHARACTERS, lease_extend, lease_next, lease_skip
from annotation.services.rankings import FLAGS, LONGEST_SECONDS, ranking_amend, ranking_submit

LARGEST_BODY_BYTES = 262_144


class BodyTooLarge(APIException):
    status_code = 413
    default_code = "too_large"
    default_detail = f"The body is larger than {LARGEST_BODY_BYTES} bytes."


class BoundedJSONParser(JSONParser):
    """JSON of a bounded size. Nesting that exhausts the parser is bad input, not a fault of the server."""

    def parse(self, stream: Any, media_type: Any = None, parser_context: Any = None) -> Any:
        body = stream.read(LARGEST_BODY_BYTES + 1)
        if len(body) > LARGEST_BODY_BYTES:
            raise BodyTooLarge
        try:
            return json.loads(body.decode("utf-8"), parse_constant=self._refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ParseError("The body is not valid JSON.") from error

    @staticmethod
    def _refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")


class UUIDTextField(serializers.UUIDField):
    """A UUID in its usual spelling. (DRF's own field takes numbers and `true` as well.)"""

    def to_internal_value(self, data: Any) -> UUID:
        if not isinstance(data, str) or len(data) != 36:
            self.fail("invalid", value=str(data)[:80])
        return super().to_internal_value(data)


class StrictCharField(serializers.CharField):
    """Text only. (DRF's own field turns numbers into text.)"""

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class StrictSerializer(serializers.Serializer[Any]):
    """Refuses fields it does not know: a misspelt one would otherwise be lost without a word."""

    def to_internal_value(self, data: Any) -> Any:
        values = super().to_internal_value(data)
        if unknown := [str(name)[:80] for name in data if name not in self.fields]:
            raise serializers.ValidationError({name: ["Unknown field."] for name in unknown[:20]})
        return values


def bands_field(**options: Any) -> serializers.ListField:
    band = serializers.ListField(child=UUIDTextField(), allow_empty=False, max_length=MAX_COMPLETIONS)
    return serializers.ListField(child=band, max_length=MAX_COMPLETIONS, help_text="Best band first; one band = tied.", **options)


class SaidSerializer(StrictSerializer):
    client_id = UUIDTextField(help_text="Made by the client; sending the same one again stores nothing new.")
    bands = bands_field()
    criteria = serializers.DictField(child=bands_field(), required=False)
    flags = serializers.DictField(child=serializers.ListField(child=serializers.ChoiceField(list(FLAGS))), required=False)
    comment = StrictCharField(required=False, allow_blank=True, max_length=COMMENT_CHARACTERS)
    duration_seconds = serializers.FloatField(required=False, allow_null=True, min_value=0, max_value=LONGEST_SECONDS)


class SubmitSerializer(SaidSerializer):
    lease = UUIDTextField()


class SkipSerializer(StrictSerializer):
    reason = serializers.ChoiceField(Skip.Reason.choices)
    comment = StrictCharField(required=False, allow_blank=True, max_length=COMMENT_CHARACTERS)


class MessageSerializer(serializers.Serializer[Any]):
    role = serializers.CharField()
    content = serializers.CharField()


class ShownSerializer(serializers.Serializer[Any]):
    id = serializers.UUIDField()
    text = serializers.CharField()


class TaskSerializer(serializers.Serializer[Any]):
    lease = serializers.UUIDField()
    expires_at = serializers.DateTimeField()
    lease_seconds = serializers.IntegerField()
    project = serializers.CharField()
    prompt = MessageSerializer(many=True)
    completions = ShownSerializer(many=True)
    criteria = serializers.ListField(child=serializers.CharField())
    ties_allowed = serializers.BooleanField()
    flags = serializers.ListField(child=serializers.CharField())


class StoredSerializer(serializers.Serializer[Any]):
    ranking = serializers.UUIDField()
    client_id = serializers.UUIDField()
    revision = serializers.IntegerField()
    created = serializers.BooleanField()
    bands = bands_field()
    created_at = serializers.DateTimeField()


class ProgressSerializer(serializers.Serializer[Any]):
    project = serializers.CharField()
    is_open = serializers.BooleanField()
    slots = serializers.IntegerField()
    done = serializers.IntegerField()
    held = serializers.IntegerField()
    left = serializers.IntegerField()
    percent = serializers.FloatField()
    prompts = serializers.IntegerField()
    prompts_done = serializers.IntegerField()
    rankings_today = serializers.IntegerField()


class ProjectSerializer(serializers.Serializer[Any]):
    slug = serializers.CharField()
    name = serializers.CharField()
    role = serializers.CharField()
    is_open = serializers.BooleanField()
    left_for_me = serializers.IntegerField()
    ranked_by_me = serializers.IntegerField()


class LeaseTimeSerializer(serializers.Serializer[Any]):
    lease = serializers.UUIDField()
    expires_at = serializers.DateTimeField()


ERROR = inline_serializer(
    "Error",
    {
        "error": inline_serializer(
            "ErrorBody",
            {
                "code": serializers.CharField(),
                "message": serializers.CharField(),
                "fields": serializers.DictField(required=False),
            },
        )
    },
)


def errors(*statuses: int) -> dict[int, Any]:
    return {status: OpenApiResponse(ERROR) for status in (401, *statuses)}


STORES = {201: StoredSerializer, 200: StoredSerializer, **errors(400, 403, 404, 409, 413)}


def parsed(serializer: type[serializers.Serializer[Any]], request: Request) -> dict[str, Any]:
    read = serializer(data=request.data)
    read.is_valid(raise_exception=True)
    return dict(read.validated_data)


def stored(ranking: Ranking, created: bool) -> Response:
    body = {
        "ranking": ranking.uid,
        "client_id": ranking.client_id,
        "revision": ranking.revision,
        "created": created,
        "bands": ranking.bands,
        "created_at": ranking.created_at,
    }
    return Response(body, status=201 if created else 200)


def task_body(lease: Lease) -> dict[str, Any]:
    project = lease.project
    return {
        "lease": lease.token,
        "expires_at": lease.expires_at,
        "lease_seconds": project.lease_seconds,
        "project": project.slug,
        **selectors.task_of(lease),
        "criteria": project.criteria,
        "ties_allowed": project.ties_allowed,
        "flags": list(FLAGS),
    }


class Desk(APIView):
    parser_classes = [BoundedJSONParser]

    @property
    def person(self) -> User:
        """Who asks. Never anonymous: every address of the API needs a token or a session."""
        return cast(User, self.request.user)


class ProjectsView(Desk):
    @extend_schema(operation_id="projects", responses={200: ProjectSerializer(many=True), **errors()})
    def get(self, request: Request) -> Response:
        """The projects that you are a member of."""
        rows = selectors.projects_of(self.person)
        return Response(
            [
                {
                    "slug": row["project"].slug,
                    "name": row["project"].name,
                    "role": row["role"],
                    "is_open": row["project"].is_open,
                    "left_for_me": row["left"],
                    "ranked_by_me": row["mine"]["all"],
                }
                for row in rows
            ]
        )


class NextView(Desk):
    @extend_schema(
        operation_id="next",
        request=None,
        responses={200: TaskSerializer, 204: OpenApiResponse(description="Nothing is left for you."), **errors(403, 404, 409, 503)},
    )
    def post(self, request: Request, slug: str) -> Response:
        """Take the next prompt; until it is ranked, skipped or run out, the answer stays the same."""
        project, _ = selectors.project_for(user=self.person, slug=slug)
        lease = lease_next(project=project, rater=self.person)
        if lease is None:
            return Response(status=204)
        lease.project = project
        return Response(task_body(lease))


class RankingsView(Desk):
    @extend_schema(
        operation_id="submit",
        request=SubmitSerializer,
        responses=STORES,
    )
    def post(self, request: Request) -> Response:
        """Submit a ranking. 201 when it is stored now, 200 when this client_id was stored before."""
        said = parsed(SubmitSerializer, request)
        return stored(*ranking_submit(rater=self.person, token=said.pop("lease"), **said))


class AmendView(Desk):
    @extend_schema(
        operation_id="amend",
        request=SaidSerializer,
        responses=STORES,
    )
    def post(self, request: Request, ranking: UUID) -> Response:
        """Store second thoughts on your own ranking as its next revision; the earlier ones stay."""
        return stored(*ranking_amend(rater=self.person, ranking_uid=ranking, **parsed(SaidSerializer, request)))


class SkipView(Desk):
    @extend_schema(operation_id="skip", request=SkipSerializer, responses={204: None, **errors(400, 404, 409, 413)})
    def post(self, request: Request, lease: UUID) -> Response:
        """Give the prompt to somebody else; it does not come back to you."""
        lease_skip(rater=self.person, token=lease, **parsed(SkipSerializer, request))
        return Response(status=204)


class ExtendView(Desk):
    @extend_schema(operation_id="extend", request=None, responses={200: LeaseTimeSerializer, **errors(404, 409)})
    def post(self, request: Request, lease: UUID) -> Response:
        """Start the lease's time anew."""
        extended = lease_extend(rater=self.person, token=lease)
        return Response({"lease": extended.token, "expires_at": extended.expires_at})


class ProgressView(Desk):
    @extend_schema(operation_id="progress", responses={200: ProgressSerializer, **errors(404)})
    def get(self, request: Request, slug: str) -> Response:
        """Totals of the project; the same for every member."""
        project, _ = selectors.project_for(user=self.person, slug=slug)
        return Response(selectors.progress_of([project])[project.pk])


def flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "0")
    if value not in {"0", "1"}:
        raise Refused("invalid", f"{name}: 0 or 1.", 400)
    return value == "1"


def following(chunks: Iterator[bytes]) -> bytes | None:
    return next(chunks, None)


async def in_turns(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """A synchronous stream for the event loop: each chunk is read in the thread that the database connection belongs to."""
    while (chunk := await sync_to_async(following)(chunks)) is not None:
        yield chunk


class ProjectRankingsView(Desk):
    @extend_schema(
        operation_id="rankings",
        parameters=[
            OpenApiParameter("policies", enum=["0", "1"], description="1 names the policy of each completion (managers, reviewers)."),
            OpenApiParameter("revisions", enum=["0", "1"], description="1 adds the revisions that were amended."),
        ],
        responses={(200, "application/x-ndjson"): OpenApiResponse(str, description="One JSON object a line."), **errors(400, 403, 404)},
    )
    def get(self, request: Request, slug: str) -> StreamingHttpResponse:
        """All rankings as JSON lines for managers and reviewers; a rater gets his own."""
        project, role = selectors.project_for(user=self.person, slug=slug)
        policies, revisions = flag(request, "policies"), flag(request, "revisions")
        if policies and role not in selectors.SEES_EVERYTHING:
            raise Refused("blind", "Raters do not see where a text comes from.", 403)
        chunks = selectors.ranking_lines(project=project, user=self.person, role=role, policies=policies, revisions=revisions)
        body = in_turns(chunks) if isinstance(request._request, ASGIRequest) else chunks
        return StreamingHttpResponse(body, content_type="application/x-ndjson")
