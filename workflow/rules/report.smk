"""Figures and the report.

Input: tables/, attention/, run folders, caches' manifests.
Output: figures/, report.html.
"""
