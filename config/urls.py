"""Every address of the site. Each app keeps its own in `urls.py`."""

from django.contrib import admin
from django.urls import include, path

from annotation.urls import websocket_urlpatterns as annotation_websockets

urlpatterns = [
    path("admin/", admin.site.urls),
    path("accounts/", include("allauth.account.urls")),
    path("", include("annotation.urls")),
    path("", include("alignment.urls")),
]
websocket_urlpatterns = [*annotation_websockets]
