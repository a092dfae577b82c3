"""The run on one page: what it learned, what it cost, and how to use what it left."""

from mlx_qlora.report.page import write_report as write_report
