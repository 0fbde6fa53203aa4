"""Evaluation: declared sets of problems, their scores, and files of results that an interrupted run resumes."""
