"""What a person looks at after training: one HTML file of one or more runs, and a picture of one."""

from hecate.report.page import html

__all__ = ["html"]
