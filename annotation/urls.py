from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

from annotation import api, views
from annotation.consumers import LiveConsumer

urlpatterns = [
    path("", views.home, name="home"),
    path("projects/<slug:slug>/", views.project, name="project"),
    path("projects/<slug:slug>/raters/", views.project_raters, name="project-raters"),
    path("projects/<slug:slug>/rank/", views.rank, name="rank"),
    path("projects/<slug:slug>/rank/task/", views.rank_task, name="rank-task"),
    path("api/v1/projects/", api.ProjectsView.as_view(), name="api-projects"),
    path("api/v1/projects/<slug:slug>/next/", api.NextView.as_view(), name="api-next"),
    path("api/v1/projects/<slug:slug>/progress/", api.ProgressView.as_view(), name="api-progress"),
    path("api/v1/projects/<slug:slug>/rankings/", api.ProjectRankingsView.as_view(), name="api-project-rankings"),
    path("api/v1/rankings/", api.RankingsView.as_view(), name="api-rankings"),
    path("api/v1/rankings/<uuid:ranking>/amend/", api.AmendView.as_view(), name="api-amend"),
    path("api/v1/leases/<uuid:lease>/skip/", api.SkipView.as_view(), name="api-skip"),
    path("api/v1/leases/<uuid:lease>/extend/", api.ExtendView.as_view(), name="api-extend"),
    path("api/v1/schema/", SpectacularAPIView.as_view(), name="api-schema"),
    path("api/v1/docs/", SpectacularSwaggerView.as_view(url_name="api-schema", template_name="annotation/api_docs.html"), name="api-docs"),
]
websocket_urlpatterns = [path("ws/live/", LiveConsumer.as_asgi())]
