"""The content-security policy by address: strict everywhere, and as much looser as the console's own scripts need under /admin/ alone."""

from csp.constants import SELF, UNSAFE_EVAL, UNSAFE_INLINE
from csp.middleware import CSPMiddleware, PolicyParts
from django.http import HttpRequest, HttpResponseBase
from django.urls import reverse

# django-unfold ships Alpine, which evaluates the expressions in its templates, and writes style attributes.
CONSOLE = {"script-src": [SELF, UNSAFE_EVAL], "style-src": [SELF, UNSAFE_INLINE]}


class ContentSecurity(CSPMiddleware):
    def get_policy_parts(self, request: HttpRequest, response: HttpResponseBase, report_only: bool = False) -> PolicyParts:
        parts = super().get_policy_parts(request=request, response=response, report_only=report_only)
        # Rows of the console are seen by people with rights there; raters' texts are shown in it as escaped text only.
        if request.path_info.startswith(reverse("admin:index")) and parts.config is None:
            parts.replace = {**CONSOLE, **(parts.replace or {})}
        return parts
