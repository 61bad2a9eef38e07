"""Names of the Channels groups, in the one place that both the services and the consumer read."""


def project_group(project_id: int) -> str:
    """Everybody who watches the progress of one project."""
    return f"project-{project_id}"
