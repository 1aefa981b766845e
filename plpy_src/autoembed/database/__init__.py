"""The one door to plpy: every statement that the Python side runs is in one of these modules.

A session that searches by meaning alone imports statements and searches, and nothing of what lanes need.
"""
