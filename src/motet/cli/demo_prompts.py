"""What the demonstration asks; the training script of the demo adapters keeps clear of these prompts."""

from __future__ import annotations

DEMO_PROMPTS = {
    "support": "My coffee grinder stopped working after two days. Can you help?",
    "sql": "Which five customers have placed the most orders?",
    "legal": (
        'What am I agreeing to here? "This Agreement shall renew automatically for further periods of 12 months '
        'unless cancelled at least 30 days prior to the end of the term."'
    ),
}
"""One prompt per adapter for a live demonstration; none of them is among the training prompts."""
