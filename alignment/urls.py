from django.urls import URLPattern, path

from alignment import views

urlpatterns: list[URLPattern] = [
    path("runs/", views.runs, name="runs"),
    path("runs/<slug:name>/", views.run, name="run"),
    path("runs/<slug:name>/live/", views.run_live, name="run-live"),
    path("runs/<slug:name>/<str:verb>/", views.run_change, name="run-change"),
    path("models/<slug:name>/", views.model, name="model"),
]
