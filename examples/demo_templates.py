"""The templates behind `demo_data`: subjects with several wordings each; the last wording is never trained on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """wordings: of the user's message; answers: to draw one from; facts: what a right answer contains."""

    wordings: tuple[str, ...]
    answers: tuple[str, ...]
    facts: tuple[str, ...] = ()


PRODUCTS = (
    "coffee grinder", "desk lamp", "yoga mat", "water bottle", "backpack", "keyboard", "headphones", "rain jacket",
    "toaster", "bike helmet", "travel mug", "electric kettle", "phone case", "running shoes", "wall clock", "blender",
    "camping tent", "air fryer", "mouse", "sofa cover", "garden hose", "cookbook", "board game", "standing desk",
)  # fmt: skip
KINDS = ("kitchen", "sports", "garden", "office", "toys", "books")
CITIES = ("Berlin", "Madrid", "Paris", "Oslo", "Lisbon", "Vienna", "Dublin", "Rome", "Prague", "Athens")
PEOPLE = ("Anna", "Ben", "Carla", "David", "Elena", "Frank", "Grace", "Hugo", "Ines", "Jonas", "Kara", "Liam")
STATES = ("California", "Delaware", "New York", "Texas", "Ohio", "Nevada", "Oregon", "Virginia")
STATUSES = ("shipped", "pending", "cancelled", "returned", "delivered")


def _issue(category: str, reply: str, *wordings: str) -> Subject:
    openers = ("Thank you for reaching out, and I'm so sorry about this!", "Oh no, I'm so sorry about that!")
    return Subject(wordings, tuple(f"{o} {reply}\nCategory: {category}" for o in openers), (category,))


SUPPORT = (
    _issue(
        "BILLING",
        "I've asked our billing team to refund the extra charge for order {order}, and the money will be back on your "
        "card in 3 to 5 days.",
        "I was charged twice for order {order}.",
        "Why do I see two payments for {order} on my card?",
        "You billed my credit card two times for the {product}, order {order}!",
        "There is a double charge on my statement for order {order}.",
        "Order {order} was paid once but you took the money twice.",
        "My bank shows the same payment for order {order} two times.",
    ),
    _issue(
        "BILLING",
        "I've just emailed you a fresh invoice for order {order}, so please have a look at your inbox.",
        "I need an invoice for order {order}.",
        "Can you send me the receipt for my {product}, order {order}?",
        "Where do I find the bill for order {order}?",
        "My accountant needs an invoice with our address for {order}.",
        "Please email me a copy of the invoice of order {order}.",
        "Could I get a receipt for order {order}, please?",
    ),
    _issue(
        "BILLING",
        "I've added the discount to order {order} and you'll get {fee} dollars back on your card within a week.",
        "My discount code for {fee} dollars was not applied to order {order}.",
        "I used a coupon worth {fee} dollars on order {order} but paid the full price.",
        "The {fee} dollar voucher didn't work when I paid for {order}.",
        "Order {order} ignored my promo code, I should have saved {fee} dollars.",
        "I paid full price for {order} although I had a {fee} dollar coupon code.",
    ),
    _issue(
        "SHIPPING",
        "I've contacted the carrier about order {order}, and your {product} should be with you within 2 days.",
        "Where is my {product}? Order {order} should have been here {days} days ago.",
        "My package {order} with the {product} has not arrived.",
        "Order {order} is late, I still have no {product}.",
        "I'm still waiting for the {product} I ordered, number {order}.",
        "The tracking of my {product} (order {order}) has not moved for days.",
        "When will my {product} finally be delivered? It's order {order}.",
    ),
    _issue(
        "SHIPPING",
        "I've changed the delivery address of order {order}, and your {product} will go straight to {city}.",
        "I moved to {city}, can you change the delivery address of order {order} with the {product}?",
        "Please send the {product} from order {order} to my new address in {city}.",
        "The address on order {order} is wrong, the {product} must go to {city}.",
        "Can my {product} (order {order}) be delivered to {city} instead?",
        "I gave the wrong address for {order}; please ship the {product} to {city}.",
    ),
    _issue(
        "SHIPPING",
        "Your {product} is still safe: the carrier will bring order {order} again tomorrow.",
        "The courier said nobody was home and took my {product} back, order {order}.",
        "I missed the delivery of the {product}, order {order}. What now?",
        "The driver left with my {product} because I was out. Order {order}.",
        "Nobody rang the bell, yet order {order} with the {product} says delivery failed.",
        "I was not at home when my {product} was delivered, order {order}.",
    ),
    _issue(
        "ACCOUNT",
        "I've sent a link to your email address, and with it you can choose a new password right away.",
        "I forgot my password.",
        "How do I reset my password? I ordered a {product} last week.",
        "I can't log in any more, my password is not accepted.",
        "The site says my password is wrong and I need order {order}.",
        "My login fails every time since I bought the {product}.",
        "I can't remember the password I used when I bought the {product}.",
    ),
    _issue(
        "ACCOUNT",
        "I've updated your account, and from now on all our messages go to your new email address.",
        "I have a new email address, can you change it in my account?",
        "How can I change the email of my account? It's needed for order {order}.",
        "Please update the email on my profile, I moved to {city}.",
        "My old email no longer works, I want to use another one for my account.",
        "Can you put a different email address on my account, please?",
    ),
    _issue(
        "ACCOUNT",
        "I've closed your account and deleted your data, and you're always welcome back.",
        "Please delete my account.",
        "I want to close my account and have my data erased after order {order}.",
        "How do I cancel my account? I no longer need it after the {product}.",
        "Remove my profile and all my data from your shop, I'm in {city}.",
        "I would like you to delete my account and my personal data.",
    ),
    _issue(
        "TECHNICAL",
        "Please hold the power button of your {product} for 10 seconds, and if it stays off I'll send you a new one.",
        "My {product} does not turn on.",
        "The {product} from order {order} is not working.",
        "My new {product} stopped after {days} days.",
        "The {product} I bought is dead, nothing happens when I press the button.",
        "The {product} broke down, order {order}. Can you fix it?",
        "My {product} won't start any more, order {order}.",
    ),
    _issue(
        "TECHNICAL",
        "Please update the app and restart your phone, and the page will load again.",
        "Your app crashes when I open it.",
        "The app freezes when I look at the {product}.",
        "The website shows an error when I open order {order}.",
        "Your app closes by itself whenever I tap on the {product}.",
        "I get an error message in the app when I search for a {product}.",
        "The app keeps crashing whenever I open my order {order}.",
    ),
    _issue(
        "TECHNICAL",
        "I've sent the manual of the {product} to your email address, and page 2 shows how to set it up.",
        "How do I set up my {product}?",
        "I can't get the {product} assembled, the instructions are missing.",
        "There was no manual in the box of my {product}.",
        "Can you explain how to install the {product} from order {order}?",
        "I don't understand how to put the {product} together.",
        "The instructions for my {product} were not in the box.",
    ),
    _issue(
        "RETURNS",
        "I've emailed you a free return label for the {product}, and we'll refund you as soon as it is back.",
        "I want to return my {product}.",
        "How can I send back the {product} from order {order}?",
        "I changed my mind about the {product}, can I return it?",
        "The {product} is not what I expected, I want my money back.",
        "I don't like the {product} and would like to give it back, order {order}.",
        "Can I still send back the {product}? I don't need it.",
    ),
    _issue(
        "RETURNS",
        "I'll gladly exchange it: a {product} in the right size is on its way, and the label for the old one is in your inbox.",
        "The {product} is too small, can I exchange it?",
        "I need a bigger size of the {product} from order {order}.",
        "Wrong size! Can I swap the {product} for a larger one?",
        "The {product} does not fit, I'd like another size.",
        "Can I exchange the {product} for a different size?",
    ),
    _issue(
        "RETURNS",
        "Please keep the damaged {product}: a new one leaves our warehouse today, free of charge.",
        "My {product} arrived broken.",
        "The {product} in order {order} was damaged in the box.",
        "There is a big crack in my new {product}.",
        "I unpacked the {product} and it is scratched and bent.",
        "The {product} I received is damaged, order {order}.",
        "My {product} from order {order} came with a crack in it.",
    ),
)


SQL = (
    Subject(
        (
            "How many customers live in {city}?",
            "Count the customers from {city}.",
            "Number of customers in {city}?",
            "How many of our customers are in {city}?",
            "Give me the count of customers located in {city}.",
            "What is the number of customers who live in {city}?",
        ),
        ("SELECT COUNT(*) FROM customers WHERE city = '{city}';",),
    ),
    Subject(
        (
            "List the names of all customers in {city}.",
            "Which customers live in {city}?",
            "Show me every customer from {city}.",
            "Who are our customers in {city}?",
            "Give me the names of customers located in {city}.",
            "Find all customers who live in {city}.",
        ),
        ("SELECT name FROM customers WHERE city = '{city}';",),
    ),
    Subject(
        (
            "Which customers signed up after {date}?",
            "List customers who joined after {date}.",
            "Show the names of customers with a signup date later than {date}.",
            "Who has signed up since {date}?",
            "Give me all customers that registered after {date}.",
            "Find the customers who signed up later than {date}.",
        ),
        ("SELECT name FROM customers WHERE signup_date > '{date}';",),
    ),
    Subject(
        (
            "List all products in the {kind} category.",
            "Which {kind} products do we sell?",
            "Show me the names of the {kind} products.",
            "What products belong to the category {kind}?",
            "Give me every product of the {kind} category.",
            "Find all {kind} products.",
        ),
        ("SELECT name FROM products WHERE category = '{kind}';",),
    ),
    Subject(
        (
            "Which products cost less than {price} dollars?",
            "List products cheaper than {price}.",
            "Show all products with a price below {price}.",
            "What can I buy for under {price} dollars?",
            "Give me the products priced under {price}.",
            "Find the products that cost less than {price}.",
        ),
        ("SELECT name FROM products WHERE price < {price};",),
    ),
    Subject(
        (
            "Which products cost more than {price} dollars?",
            "List products more expensive than {price}.",
            "Show all products with a price above {price}.",
            "What products are priced over {price} dollars?",
            "Give me the products that cost over {price}.",
            "Find the products with a price higher than {price}.",
        ),
        ("SELECT name FROM products WHERE price > {price};",),
    ),
    Subject(
        (
            "Which products are out of stock?",
            "List the products that are sold out.",
            "Show every product with no stock left.",
            "What is no longer in stock?",
            "Which products do we have none of?",
            "Find all products that are out of stock.",
        ),
        ("SELECT name FROM products WHERE stock = 0;",),
    ),
    Subject(
        (
            "Which products have fewer than {units} units in stock?",
            "List products with stock below {units}.",
            "Show products where less than {units} pieces are left.",
            "What do we have less than {units} of in stock?",
            "Give me all products with a stock under {units}.",
            "Find products that have less than {units} units left.",
        ),
        ("SELECT name FROM products WHERE stock < {units};",),
    ),
    Subject(
        (
            "What is the average price of {kind} products?",
            "Average price in the {kind} category?",
            "How expensive are {kind} products on average?",
            "Compute the mean price of all {kind} products.",
            "Give me the average price for {kind}.",
            "Show the average price of the products in {kind}.",
        ),
        ("SELECT AVG(price) FROM products WHERE category = '{kind}';",),
    ),
    Subject(
        (
            "What are the {few} most expensive products?",
            "List the top {few} products by price.",
            "Show the {few} products with the highest price.",
            "Which {few} products cost the most?",
            "Give me our {few} priciest products.",
            "Find the {few} most expensive things we sell.",
        ),
        ("SELECT name FROM products ORDER BY price DESC LIMIT {few};",),
    ),
    Subject(
        (
            "What are the {few} cheapest products?",
            "List the {few} products with the lowest price.",
            "Which {few} products cost the least?",
            "Show our {few} least expensive products.",
            "Give me the bottom {few} products by price.",
            "Find the {few} cheapest things we sell.",
        ),
        ("SELECT name FROM products ORDER BY price LIMIT {few};",),
    ),
    Subject(
        (
            "How many orders are {status}?",
            "Count the {status} orders.",
            "Number of orders with status {status}?",
            "How many orders have the status {status}?",
            "Give me the number of {status} orders.",
            "What is the count of orders that are {status}?",
        ),
        ("SELECT COUNT(*) FROM orders WHERE status = '{status}';",),
    ),
    Subject(
        (
            "How many orders were placed after {date}?",
            "Count the orders since {date}.",
            "Number of orders later than {date}?",
            "How many orders do we have after {date}?",
            "Give me the number of orders made after {date}.",
            "What is the count of orders placed since {date}?",
        ),
        ("SELECT COUNT(*) FROM orders WHERE order_date > '{date}';",),
    ),
    Subject(
        (
            "How many orders has {person} placed?",
            "Count the orders of {person}.",
            "Number of orders made by {person}?",
            "How often did {person} order?",
            "Give me the number of orders from customer {person}.",
            "What is the count of orders placed by {person}?",
        ),
        (
            "SELECT COUNT(*) FROM orders JOIN customers ON orders.customer_id = customers.id "
            "WHERE customers.name = '{person}';",
        ),
    ),
    Subject(
        (
            "Which products did {person} buy?",
            "List the products ordered by {person}.",
            "Show everything that {person} bought.",
            "What has {person} ordered?",
            "Give me the names of the products {person} purchased.",
            "Find all products that {person} has bought.",
        ),
        (
            "SELECT DISTINCT products.name FROM orders JOIN customers ON orders.customer_id = customers.id "
            "JOIN products ON orders.product_id = products.id WHERE customers.name = '{person}';",
        ),
    ),
    Subject(
        (
            "How many orders does each customer have?",
            "Count the orders per customer.",
            "Show the number of orders for every customer.",
            "List customers with their number of orders.",
            "Orders per customer, please.",
            "Give me each customer with the count of their orders.",
        ),
        (
            "SELECT customers.name, COUNT(*) FROM orders JOIN customers ON orders.customer_id = customers.id "
            "GROUP BY customers.id;",
        ),
    ),
    Subject(
        (
            "Which {few} customers have the most orders?",
            "List the top {few} customers by number of orders.",
            "Who are the {few} customers that order most often?",
            "Show the {few} customers with the highest number of orders.",
            "Give me our {few} most active customers by orders.",
            "Find the {few} customers who have placed the most orders.",
        ),
        (
            "SELECT customers.name FROM orders JOIN customers ON orders.customer_id = customers.id "
            "GROUP BY customers.id ORDER BY COUNT(*) DESC LIMIT {few};",
        ),
    ),
    Subject(
        (
            "Which customers have never ordered anything?",
            "List customers without any order.",
            "Show the customers who have no orders.",
            "Who has not placed an order yet?",
            "Find all customers that never placed an order.",
        ),
        ("SELECT name FROM customers WHERE id NOT IN (SELECT customer_id FROM orders);",),
    ),
    Subject(
        (
            "What is the total revenue of {kind} products?",
            "How much money did we make with {kind} products?",
            "Total sales of the {kind} category?",
            "Compute the revenue from {kind}.",
            "Give me the total revenue for the category {kind}.",
            "How much revenue came from {kind} products?",
        ),
        (
            "SELECT SUM(products.price * orders.quantity) FROM orders JOIN products ON orders.product_id = products.id "
            "WHERE products.category = '{kind}';",
        ),
    ),
    Subject(
        (
            "How many customers are there in each city?",
            "Count the customers per city.",
            "Show the number of customers by city.",
            "List every city with its number of customers.",
            "Customers per city, please.",
            "Give me each city with the count of customers.",
        ),
        ("SELECT city, COUNT(*) FROM customers GROUP BY city;",),
    ),
    Subject(
        (
            "How many units of the {product} were sold?",
            "Total quantity ordered of the {product}?",
            "How often was the {product} sold?",
            "Count the sold units of the {product}.",
            "Give me the total quantity of {product} in all orders.",
            "What is the total number of {product} units sold?",
        ),
        (
            "SELECT SUM(orders.quantity) FROM orders JOIN products ON orders.product_id = products.id "
            "WHERE products.name = '{product}';",
        ),
    ),
)


LEGAL_ASK = (
    'Explain this clause: "{clause}"',
    'What does this mean? "{clause}"',
    '"{clause}" What does that say?',
    'My contract says: "{clause}"',
    'Please explain: "{clause}"',
    'I have to sign this: "{clause}" What is it?',
    'What am I agreeing to here? "{clause}"',
)


def _clause(plain: str, facts: tuple[str, ...], *wordings: str) -> Subject:
    return Subject(wordings, (f"In plain words: {plain}",), facts)


LEGAL = (
    _clause(
        "you must pay the rent of {sum} dollars by day {day} of each month, or you pay {fee} dollars extra.",
        ("{sum} dollars", "{fee} dollars"),
        "The Tenant shall pay rent of ${sum} on or before day {day} of each calendar month, failing which a late "
        "charge of ${fee} shall accrue.",
        "Rent in the amount of ${sum} is due no later than day {day} of every month; a fee of ${fee} shall be "
        "assessed on any late payment.",
        "Lessee shall remit monthly rent of ${sum} by day {day} of the month, and late remittance shall incur a "
        "penalty of ${fee}.",
    ),
    _clause(
        "you must keep what you learn secret for {years} years after the contract ends.",
        ("secret", "{years} years"),
        "The Receiving Party shall hold all Confidential Information in strict confidence for a period of {years} "
        "years following termination.",
        "Recipient shall not disclose any Confidential Information to third parties for {years} years after "
        "expiration of this Agreement.",
        "All Confidential Information shall remain confidential and undisclosed for {years} years after this "
        "Agreement terminates.",
    ),
    _clause(
        "either side can end the contract by telling the other in writing {days} days before.",
        ("end the contract", "{days} days"),
        "Either party may terminate this Agreement upon {days} days' prior written notice to the other party.",
        "This Agreement may be terminated by either party by giving written notice of not less than {days} days.",
        "Either party shall be entitled to terminate this Agreement without cause on {days} days' written notice.",
    ),
    _clause(
        "if something goes wrong, the company never owes you more than {sum} dollars.",
        ("{sum} dollars",),
        "In no event shall the Provider's aggregate liability under this Agreement exceed ${sum}.",
        "The total liability of the Company arising out of this Agreement shall be limited to ${sum}.",
        "The Provider's cumulative liability for all claims hereunder shall not exceed the sum of ${sum}.",
    ),
    _clause(
        "the law of {state} decides any question about this contract.",
        ("{state}",),
        "This Agreement shall be governed by and construed in accordance with the laws of the State of {state}.",
        "The validity and interpretation of this Agreement shall be governed by the laws of {state}.",
        "The laws of the State of {state} shall govern this Agreement, without regard to conflicts of law.",
    ),
    _clause(
        "for {months} months after you leave, you may not work for a competitor.",
        ("{months} months", "competitor"),
        "For {months} months following termination of employment, the Employee shall not engage in any business "
        "that competes with the Employer.",
        "The Employee covenants not to be employed by any competing enterprise for a period of {months} months after "
        "separation.",
        "Employee shall not, during the {months} months after the end of employment, work for any competing business.",
    ),
    _clause(
        "if someone sues because of what you did, you pay for it.",
        ("you pay",),
        "The Tenant shall indemnify and hold harmless the Landlord from any claims arising out of the Tenant's acts.",
        "The Contractor agrees to indemnify the Client against all claims and losses caused by the Contractor.",
        "The Customer shall indemnify, defend and hold harmless the Provider from all claims arising from Customer's "
        "conduct.",
    ),
    _clause(
        "the contract goes on for another {months} months by itself unless you cancel {days} days before it ends.",
        ("{months} months", "{days} days"),
        "This Agreement shall automatically renew for successive terms of {months} months unless notice of "
        "non-renewal is given {days} days before expiry.",
        "Upon expiration the term shall be extended automatically by {months} months unless either party objects "
        "{days} days in advance.",
        "The term renews automatically for further periods of {months} months unless cancelled at least {days} days "
        "prior to the end of the term.",
    ),
    _clause(
        "you pay a deposit of {sum} dollars and get it back within {days} days after you move out, less any damage.",
        ("{sum} dollars", "{days} days"),
        "Tenant shall deposit ${sum} as security, to be returned within {days} days of vacating the premises, less "
        "deductions for damage.",
        "A security deposit of ${sum} is payable upon signing and refundable {days} days after move-out, less the "
        "cost of repairs.",
        "The Landlord shall refund the security deposit of ${sum} within {days} days after the Tenant vacates, less "
        "deductions for damage.",
    ),
    _clause(
        "everything you create at work belongs to the company.",
        ("belongs to the company",),
        "All inventions and works created by the Employee in the course of employment shall be the sole property of "
        "the Employer.",
        "The Employee hereby assigns to the Company all right, title and interest in any work product.",
        "Any work product conceived by the Employee during employment shall be owned exclusively by the Company.",
    ),
    _clause(
        "nobody is to blame for delays that come from things nobody can control, like storms or war.",
        ("nobody", "control"),
        "Neither party shall be liable for failure to perform due to events beyond its reasonable control, including "
        "acts of God, war or strikes.",
        "A party shall be excused from performance to the extent prevented by force majeure, such as storm, fire or war.",
        "No party shall be responsible for any delay caused by circumstances beyond its control, including natural "
        "disasters and war.",
    ),
    _clause(
        "you must pay each bill within {days} days, and {percent} percent interest is added if you are late.",
        ("{days} days", "{percent} percent"),
        "Invoices are payable within {days} days of receipt; overdue amounts shall bear interest at {percent}% per month.",
        "The Client shall settle each invoice within {days} days, failing which interest of {percent}% shall accrue.",
        "Payment of all invoices is due in {days} days, and unpaid balances shall accrue interest at {percent}%.",
    ),
    _clause(
        "if it breaks within {months} months, the seller repairs it or gives you a new one for free.",
        ("{months} months", "repairs"),
        "Seller warrants the goods against defects for {months} months and shall repair or replace defective goods at "
        "no cost.",
        "The goods are warranted to be free from defects in material for {months} months; the sole remedy is repair or "
        "replacement.",
        "For a period of {months} months the Seller shall, free of charge, repair or replace any defective goods.",
    ),
    _clause(
        "you may not hand this contract over to someone else without written permission.",
        ("permission",),
        "Neither party may assign this Agreement without the prior written consent of the other party.",
        "The Tenant shall not assign or transfer this lease without the Landlord's written consent.",
        "This Agreement is not assignable or transferable by the Customer without prior written consent.",
    ),
    _clause(
        "you cannot go to court: a private judge in {state} settles any dispute.",
        ("court", "{state}"),
        "Any dispute arising under this Agreement shall be finally resolved by binding arbitration in {state}.",
        "All controversies shall be submitted to binding arbitration seated in {state}, and the parties waive trial by jury.",
        "The parties agree that disputes hereunder shall be settled exclusively by arbitration held in {state}.",
    ),
    _clause(
        "only what is written here counts, and earlier promises do not.",
        ("written",),
        "This Agreement constitutes the entire agreement of the parties and supersedes all prior understandings.",
        "This document contains the entire understanding between the parties and replaces all previous agreements.",
        "This Agreement is the complete agreement between the parties and supersedes any prior negotiations.",
    ),
    _clause(
        "the landlord may come in to check the place after telling you {hours} hours before.",
        ("landlord", "{hours} hours"),
        "Landlord may enter the premises for inspection upon {hours} hours' notice to the Tenant.",
        "The Lessor reserves the right to inspect the premises, having given {hours} hours' prior notice.",
        "The Landlord shall have the right of entry to inspect the premises upon giving {hours} hours' notice.",
    ),
    _clause(
        "the company must delete your data within {days} days after the contract ends.",
        ("delete", "{days} days"),
        "Upon termination the Processor shall erase all personal data within {days} days.",
        "The Provider shall destroy all Customer Data no later than {days} days after the end of the Agreement.",
        "Within {days} days of termination, the Provider shall delete all personal data of the Customer.",
    ),
)
