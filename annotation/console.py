"""What the admin pages of this app share: actions that ask first, rankings and messages as people read them, and pages to look at only."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from django.contrib import messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin

from annotation.errors import Refused

SHORT = 400


class ConsoleAdmin(ModelAdmin):
    """Rows can be found by search, and lists stay quick when there are many of them."""

    show_full_result_count = False
    list_per_page = 50
    compressed_fields = True


class LookOnlyAdmin(ConsoleAdmin):
    """History: it can be read, and neither added, changed nor deleted."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def asking(*, name: str, question: str, permission: str = "change") -> Callable[[Callable[..., str]], Callable[..., Any]]:
    """An action that shows what it is about to do and waits for a yes. The function does it and returns what to tell.

    Args: name: of the action in the list;  question: with {count}, what happens and to what.
    """

    def decorate(act: Callable[[ModelAdmin, HttpRequest, QuerySet[Any]], str]) -> Callable[..., Any]:
        def action(admin: ModelAdmin, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
            if "confirmed" not in request.POST:
                return _question(admin, request, queryset, act.__name__, question)
            try:
                admin.message_user(request, act(admin, request, queryset), messages.SUCCESS)
            except Refused as error:
                admin.message_user(request, error.message, messages.ERROR)
            return None

        action.__name__ = act.__name__
        action.short_description = name  # type: ignore[attr-defined]
        action.allowed_permissions = (permission,)  # type: ignore[attr-defined]
        return action

    return decorate


def _question(admin: ModelAdmin, request: HttpRequest, queryset: QuerySet[Any], action: str, question: str) -> HttpResponse:
    across = request.POST.get("select_across") == "1"
    context = {
        **admin.admin_site.each_context(request),
        "title": "Are you sure?",
        "opts": admin.opts,
        "media": admin.media,
        "question": question.format(count=queryset.count()),
        "rows": [str(row) for row in queryset[:20]],
        "more": max(queryset.count() - 20, 0),
        # "All, on every page" stays one word, for a form of thousands of fields would be refused.
        "selected": [str(pk) for pk in (queryset[:1] if across else queryset).values_list("pk", flat=True)],
        "across": across,
        "checkbox": ACTION_CHECKBOX_NAME,
        "action": action,
    }
    return TemplateResponse(request, "annotation/console_question.html", context)


def shown_json(value: Any) -> SafeString:
    return format_html('<pre class="whitespace-pre-wrap">{}</pre>', json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True))


def shown_messages(turns: Sequence[Mapping[str, str]]) -> SafeString:
    """A conversation as plain text, each turn under its role. What people and models wrote is escaped, never rendered."""
    rows = ((turn.get("role", ""), turn.get("content", "")) for turn in turns)
    return format_html_join("", '<p><strong>{}</strong></p><p class="whitespace-pre-wrap mb-3">{}</p>', rows)


def shown_bands(bands: Sequence[Sequence[str]], completions: Mapping[str, tuple[str, str]]) -> SafeString:
    """Bands from best to worst with the beginning of each text and its policy."""
    lines = [
        (number, text if len(text) <= SHORT else text[:SHORT] + "…", policy or "policy not named")
        for number, band in enumerate(bands, start=1)
        for text, policy in (completions.get(uid, (f"(completion {uid} is gone)", "")) for uid in band)
    ]
    return format_html_join("", '<p class="whitespace-pre-wrap mb-2"><strong>{}.</strong> {} <em>({})</em></p>', lines)


def count_of(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def selected_ids(queryset: QuerySet[Model]) -> list[int]:
    return list(queryset.values_list("pk", flat=True))
