"""The console's pages of people: users, groups, tokens, addresses. `admin.py` brings them in."""

from typing import Any, cast

from allauth.account.models import EmailAddress
from django.contrib import admin, messages
from django.contrib.admin.models import ADDITION, DELETION, LogEntry
from django.contrib.admin.options import get_content_type_for_model
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from rest_framework.authtoken.models import TokenProxy
from unfold.admin import TabularInline
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.views import ChangeList

from annotation.console import ConsoleAdmin, asking, count_of, selected_ids
from annotation.models import Membership, User

for foreign in (Group, TokenProxy, EmailAddress):
    if admin.site.is_registered(foreign):
        admin.site.unregister(foreign)


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ConsoleAdmin):
    search_fields = ("name",)


@admin.register(EmailAddress)
class EmailAddressAdmin(ConsoleAdmin):
    list_display = ("email", "user", "verified", "primary")
    list_filter = ("verified",)
    search_fields = ("email", "user__username")
    autocomplete_fields = ("user",)


class TokenList(ChangeList):
    """Addresses of tokens name the user, for the primary key of a token is the secret itself."""

    def url_for_result(self, result: Any) -> str:
        return reverse("admin:authtoken_tokenproxy_change", args=(result.user_id,))


@admin.register(TokenProxy)
class TokenAdmin(ConsoleAdmin):
    """A token is as good as a password: the list does not show it, and it cannot be edited, only made and deleted."""

    list_display = ("user", "created")
    search_fields = ("user__username",)
    autocomplete_fields = ("user",)
    fields = ("user",)
    list_select_related = ("user",)
    actions = None

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return TokenList

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        return self.get_queryset(request).filter(user_id=object_id).first() if object_id.isdecimal() else None

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> None:
        self._log(request, obj, ADDITION)

    def log_deletions(self, request: HttpRequest, queryset: Any) -> None:
        for obj in queryset:
            self._log(request, obj, DELETION)

    def _log(self, request: HttpRequest, obj: Any, flag: int) -> None:
        # A token's text is the secret, and the history of the console must not keep it.
        kind = get_content_type_for_model(obj).pk
        LogEntry.objects.create(
            user_id=cast(int, request.user.pk),
            content_type_id=kind,
            object_id=obj.user_id,
            object_repr=f"token of {obj.user}",
            action_flag=flag,
        )

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        messages.warning(request, f"The token of {obj.user} is {obj.key} - copy it now; lists never show it.")


class MembershipInline(TabularInline):
    model = Membership
    extra = 0
    fields = ("project", "user", "role")
    autocomplete_fields = ("project", "user")
    tab = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[Membership]:
        # Raters of files may be hundreds; the page of memberships lists them.
        return super().get_queryset(request).filter(user__kind=User.Kind.HUMAN).select_related("project", "user")


@admin.register(User)
class UserAdmin(DjangoUserAdmin, ConsoleAdmin):
    form = UserChangeForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "kind", "is_active", "is_staff", "rankings", "last_login")
    list_filter = ("kind", "is_active", "is_staff", "is_superuser", "memberships__project", "memberships__role")
    search_fields = ("username", "first_name", "last_name", "email")
    fieldsets = (*(DjangoUserAdmin.fieldsets or ()), ("Rankloop", {"fields": ("kind",)}))
    inlines = (MembershipInline,)
    actions = ("sign_in_off", "sign_in_on")

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        return super().get_queryset(request).annotate(ranked=Count("rankings", filter=Q(rankings__is_current=True), distinct=True))

    def get_readonly_fields(self, request: HttpRequest, obj: User | None = None) -> tuple[str, ...]:
        # A ranking carries its author's name and kind into snapshots: both stay as they were when he has ranked.
        ranked = obj is not None and obj.rankings.exists()
        return ("kind", "username", "last_login", "date_joined") if ranked else ("last_login", "date_joined")

    @admin.display(ordering="ranked", description="rankings")
    def rankings(self, user: Any) -> int:
        return user.ranked

    @asking(name="Stop from signing in", question="Stop the selected users ({count}) from signing in? Their rankings stay.")
    def sign_in_off(self, request: HttpRequest, queryset: QuerySet[User]) -> str:
        number = User.objects.filter(pk__in=selected_ids(queryset)).exclude(pk=cast(int, request.user.pk)).update(is_active=False)
        return f"{count_of(number, 'user', 'users')} cannot sign in any more (you are never among them)."

    @asking(
        name="Let sign in",
        question="Let the selected users ({count}) sign in? Users of files and simulations have no password and stay out.",
    )
    def sign_in_on(self, request: HttpRequest, queryset: QuerySet[User]) -> str:
        number = User.objects.filter(pk__in=selected_ids(queryset), kind=User.Kind.HUMAN).update(is_active=True)
        return f"{count_of(number, 'user', 'users')} can sign in."
