"""The study of forgetting: see PLAN.md."""
